"""Erasure: a fragment is written anew without its retired rows, so that the old one and their bytes can be deleted."""

import numpy as np

from functa.storage.functaset.fragment import Fragment, Shard
from functa.storage.functaset.plan import RowTable
from functa.storage.functaset.planning import plan_fragment
from functa.storage.functaset.writing import write_shard


def rewrite(old: Fragment) -> Fragment:
    """Write, or adopt, a fragment of the rows that are not retired, bad ones too; it is not committed yet.

    Latents, PSNRs and digests come out as they are stored. How many numbers were clipped is not known by row, and is
    0 in the new fragment. Raises StorageError: damage, a full disk.
    """
    kept = [(shard, np.flatnonzero(~shard.retired)) for shard in old.live]
    plan = old.plan
    fresh = plan_fragment(
        old.location,
        RowTable.join([shard.table().take(rows) for shard, rows in kept]),
        split=plan.split,
        latent_shape=plan.latent_shape,
        shard_rows=plan.shard_rows,
        chunk_rows=plan.chunk_rows,
        quantizer=old.quantizer,
        codec=plan.codec,
        replaces=plan.id,
        versions=plan.created_by,
    )
    rows = _Rows([(shard, int(row)) for shard, within in kept for row in within])
    for shard in fresh.shards:
        _copy(rows, shard)
    return fresh


class _Rows:
    """The kept rows of a fragment by their number, one source shard in memory at a time: both orders are the ids'."""

    def __init__(self, positions: list[tuple[Shard, int]]) -> None:
        self.positions = positions
        self.shard: Shard | None = None

    def take(self, row: int) -> tuple[np.ndarray, np.float32, np.ndarray, str | None]:
        """Return (latent float32 [s, s, c], PSNR, sha256 [32], reason if bad)."""
        shard, inside = self.positions[row]
        if shard is not self.shard:
            z, self.psnr, self.sha256 = (shard.array(name) for name in ("z", "psnr", "source_sha256"))
            # Decoded and coded again a code is the same: it is the middle of its bin.
            self.z = shard.fragment.dequantized(z)
            self.shard = shard
        return self.z[inside], self.psnr[inside], self.sha256[inside], shard.receipt.bad.get(inside)


def _copy(rows: _Rows, shard: Shard) -> None:
    taken = [rows.take(row) for row in shard.table().rows.tolist()]
    reasons = {row: reason for row, (*_, reason) in enumerate(taken) if reason is not None}
    write_shard(
        shard,
        latents=np.stack([z for z, *_ in taken]),
        psnr=np.array([psnr for _, psnr, *_ in taken], np.float32),
        sha256=np.stack([sha256 for _, _, sha256, _ in taken]),
        good=np.array([row not in reasons for row in range(len(taken))]),
        reasons=reasons,
        max_clip_fraction=1.0,
        versions=shard.fragment.plan.created_by,
    )
