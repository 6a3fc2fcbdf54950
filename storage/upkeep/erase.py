"""Rows into new fragments as they are stored: of one fragment, to erase its retired rows; of many, to merge them."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from functa.storage.functaset.fragment import Fragment
from functa.storage.functaset.plan import RowTable
from functa.storage.functaset.planning import plan_fragment
from functa.storage.functaset.shards.shard import Shard
from functa.storage.functaset.shards.writing import write_shard
from functa.storage.places.side_by_side import side_by_side

KEPT_BYTES = 1 << 30  # of shards that are being copied from: rows of many fragments are mixed


@dataclass(frozen=True)
class Lengths:
    """Upper bounds of a shard's and a chunk's rows."""

    shard: int
    chunk: int


def rewrite(old: Sequence[Fragment], lengths: Lengths | None = None) -> Fragment:
    """Write, or adopt, one fragment of all rows that are not retired, bad ones too; it is not committed yet.

    The old ones have one split, latent shape and quantiser. lengths: of the new one; those of the first if left out.
    Latents, PSNRs and digests come out as they are stored. How many numbers were clipped is not known by row, and is
    0 in the new fragment. Raises StorageError: damage, a full disk.
    """
    rows = _Rows(old)
    plan, location = old[0].plan, old[0].location
    fresh = plan_fragment(
        location,
        rows.table(),
        split=plan.split,
        latent_shape=plan.latent_shape,
        shard_rows=lengths.shard if lengths else plan.shard_rows,
        chunk_rows=lengths.chunk if lengths else plan.chunk_rows,
        quantizer=old[0].quantizer,
        codec=plan.codec,
        replaces=" ".join(each.id for each in old),
        versions=plan.created_by,
    )
    for shard in fresh.shards:
        if shard.find_receipt() is None:
            _copy(rows, shard)
    return fresh


@dataclass(frozen=True)
class _Block:
    """A shard's rows as they are stored."""

    z: np.ndarray
    psnr: np.ndarray
    sha256: np.ndarray
    reasons: dict[int, str]


class _Rows:
    """The rows of fragments that are not retired, by their number; so many shards in memory as KEPT_BYTES allow."""

    def __init__(self, fragments: Sequence[Fragment]) -> None:
        self.shards = [shard for fragment in fragments for shard in fragment.live]
        self.location = fragments[0].location
        self.kept = [np.flatnonzero(~shard.retired) for shard in self.shards]
        self.numbers = np.repeat(np.arange(len(self.shards)), [len(rows) for rows in self.kept])
        self.within = np.concatenate(self.kept)
        self._blocks: OrderedDict[int, _Block] = OrderedDict()
        self._bytes = 0

    def table(self) -> RowTable:
        """Read the table of all rows."""
        tables = side_by_side(self.location, Shard.table, self.shards)
        return RowTable.join([table.take(rows) for table, rows in zip(tables, self.kept, strict=True)])

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[int, str]]:
        """Return (latents float32 [n, s, s, c], PSNR [n], sha256 [n, 32], row -> reason of the bad ones)."""
        numbers, within = self.numbers[rows], self.within[rows]
        latents = np.empty((len(rows), *self.shards[0].fragment.plan.latent_shape), np.float32)
        psnr, sha256 = np.empty(len(rows), np.float32), np.empty((len(rows), 32), np.uint8)
        reasons: dict[int, str] = {}
        for number in np.unique(numbers).tolist():
            here, block = np.flatnonzero(numbers == number), self._block(number)
            inside = within[here]
            # Decoded and coded again a code is the same: it is the middle of its bin.
            latents[here] = self.shards[number].fragment.dequantized(block.z[inside])
            psnr[here], sha256[here] = block.psnr[inside], block.sha256[inside]
            bad = ((row, block.reasons.get(at)) for row, at in zip(here.tolist(), inside.tolist(), strict=True))
            reasons |= {row: reason for row, reason in bad if reason is not None}
        return latents, psnr, sha256, reasons

    def _block(self, number: int) -> _Block:
        if number in self._blocks:
            self._blocks.move_to_end(number)
            return self._blocks[number]
        shard = self.shards[number]
        z, psnr, sha256 = (shard.array(name) for name in ("z", "psnr", "source_sha256"))
        self._blocks[number] = _Block(z, psnr, sha256, dict(shard.receipt.bad))
        self._bytes += z.nbytes
        while self._bytes > KEPT_BYTES and len(self._blocks) > 1:
            self._bytes -= self._blocks.popitem(last=False)[1].z.nbytes
        return self._blocks[number]


def _copy(rows: _Rows, shard: Shard) -> None:
    latents, psnr, sha256, reasons = rows.take(shard.table().rows)
    write_shard(
        shard,
        latents=latents,
        psnr=psnr,
        sha256=sha256,
        good=np.array([row not in reasons for row in range(len(psnr))]),
        reasons=reasons,
        max_clip_fraction=1.0,
        versions=shard.fragment.plan.created_by,
    )
