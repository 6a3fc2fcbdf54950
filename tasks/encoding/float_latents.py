"""The latents of another functaset at 32 bits, of the same images and field: fewer bits need no inner steps again."""

from dataclasses import dataclass

import numpy as np

from functa.storage.errors import DamagedObject, MissingObject
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.plan import RowTable
from functa.storage.functaset.shards.shard import Shard


@dataclass(frozen=True, eq=False)
class KnownRows:
    """Rows of a shard: latents float32 [n, s, s, c], PSNR [n], sha256 uint8 [n, 32], row -> reason of the bad ones."""

    latents: np.ndarray
    psnr: np.ndarray
    sha256: np.ndarray
    bad: dict[int, str]

    @property
    def good(self) -> np.ndarray:
        """bool [n]: rows that were encoded."""
        good = np.ones(len(self.latents), bool)
        good[list(self.bad)] = False
        return good


class FloatLatents:
    """A functaset of float32 latents. Encodings of the same images cut them into the same shards."""

    def __init__(self, uri: str) -> None:
        self._fragments = [fragment for fragment in Functaset.open(uri).fragments if fragment.plan.bits == 32]

    def find(self, shard: Shard, rows: RowTable) -> KnownRows | None:
        """Return the rows of a planned shard; None where no whole shard holds the same images in the same order."""
        wanted = shard.fragment.plan
        for fragment in self._fragments:
            plan = fragment.plan
            if (plan.split, plan.shard_rows) != (wanted.split, wanted.shard_rows) or shard.number >= plan.shards:
                continue
            there = fragment.shards[shard.number]
            try:
                if not _same(there.table(), rows):
                    continue
                latents, psnr, sha256 = (there.array(name) for name in ("z", "psnr", "source_sha256"))
                return KnownRows(latents, psnr, sha256, dict(there.receipt.bad))
            except (DamagedObject, MissingObject):  # then its images are encoded
                return None
        return None


def _same(one: RowTable, other: RowTable) -> bool:
    return (
        list(one.keys) == list(other.keys)
        and list(one.tokens) == list(other.tokens)
        and np.array_equal(one.labels, other.labels)
        and np.array_equal(one.augmentations, other.augmentations)
    )
