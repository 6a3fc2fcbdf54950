"""A fragment written anew without its retired rows, so that the old one's bytes can go."""

import numpy as np

from functa.storage.functaset.fragment import committed_receipt, live_shards, read_array, retired_rows
from functa.storage.functaset.history import CommittedFragment
from functa.storage.functaset.plan import Plan, load_quantizer, plan_fragment, plan_rows
from functa.storage.functaset.shard import Receipt, write_shard
from functa.storage.places.location import Location


def rewrite(location: Location, entry: CommittedFragment, plan: Plan) -> Plan:
    """Writes, or adopts, a fragment of the rows that are not retired, bad ones too; it is not committed yet.

    Latents, PSNRs and digests come out as they are stored. How many numbers were clipped is not known by row, and is
    0 in the new fragment. Raises StorageError: damage, a full disk.
    """
    live = [(shard, ~retired_rows(entry, plan, shard)) for shard in live_shards(entry, plan)]
    tables = [(plan_rows(location, plan, shard), kept) for shard, kept in live]
    fresh = plan_fragment(
        location,
        split=plan.split,
        keys=[key for table, kept in tables for key, keep in zip(table.keys, kept, strict=True) if keep],
        labels=np.concatenate([table.labels[kept] for table, kept in tables]),
        tokens=[token for table, kept in tables for token, keep in zip(table.tokens, kept, strict=True) if keep],
        augmentations=np.concatenate([table.augmentations[kept] for table, kept in tables]),
        latent_shape=plan.latent_shape,
        shard_rows=plan.shard_rows,
        chunk_rows=plan.chunk_rows,
        quantizer=load_quantizer(location, plan),
        codec=plan.codec,
        replaces=plan.id,
        versions=plan.created_by,
    )
    rows = _Rows(location, entry, plan, live)
    for shard in range(fresh.shards):
        _copy(location, rows, fresh, shard)
    return fresh


class _Rows:
    """The kept rows of a fragment by their number, one source shard in memory at a time: both orders are the ids'."""

    def __init__(
        self, location: Location, entry: CommittedFragment, plan: Plan, live: list[tuple[int, np.ndarray]]
    ) -> None:
        self.location, self.entry, self.plan = location, entry, plan
        self.places = [(shard, int(row)) for shard, kept in live for row in np.flatnonzero(kept)]
        self.quantizer = load_quantizer(location, plan)
        self.shard = -1

    def take(self, row: int) -> tuple[np.ndarray, np.float32, np.ndarray, str | None]:
        """(latent float32 [s, s, c], PSNR, sha256 [32], reason if bad)."""
        shard, inside = self.places[row]
        if shard != self.shard:
            receipt = committed_receipt(self.location, self.entry, self.plan, shard)
            self._load(receipt)
            self.shard = shard
        return self.z[inside], self.psnr[inside], self.sha256[inside], self.bad.get(inside)

    def _load(self, receipt: Receipt) -> None:
        z, self.psnr, self.sha256 = (
            read_array(self.location, self.plan, receipt, name) for name in ("z", "psnr", "source_sha256")
        )
        # Decoded and coded again a code is the same: it stands for the middle of its bin.
        self.z = self.quantizer.decode(z) if self.quantizer else z
        self.bad = receipt.bad


def _copy(location: Location, rows: _Rows, fresh: Plan, shard: int) -> None:
    table = plan_rows(location, fresh, shard)
    taken = [rows.take(int(row)) for row in table.rows]
    reasons = {row: reason for row, (*_, reason) in enumerate(taken) if reason is not None}
    write_shard(
        location,
        fresh,
        shard,
        latents=np.stack([z for z, *_ in taken]),
        labels=table.labels,
        psnr=np.array([psnr for _, psnr, *_ in taken], np.float32),
        sha256=np.stack([sha256 for _, _, sha256, _ in taken]),
        good=np.array([row not in reasons for row in range(len(taken))]),
        reasons=reasons,
        max_clip_fraction=1.0,
        versions=fresh.created_by,
    )
