"""The visible rows of a functaset in parts that fit into memory, for formats that know nothing of it."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from functa.storage.functaset.functaset import COLUMNS, Functaset
from functa.storage.functaset.shards.shard import Shard
from functa.storage.places.side_by_side import side_by_side

PART_BYTES = 256 << 20  # of latents as float32; one shard at least


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a part: key, label int32 [n], psnr float32 [n] in dB, augmentation int32 [n], z float32 [n, s, s, c]."""

    keys: list[str]
    labels: np.ndarray
    psnr: np.ndarray
    augmentation: np.ndarray
    z: np.ndarray


@dataclass(frozen=True, eq=False)
class Part:
    """Whole shards of a split; `number` of `count`, its first row has the number `first` in the split."""

    split: str
    number: int
    count: int
    first: int
    shards: tuple[Shard, ...]

    def read(self) -> Rows:
        """Read its rows; every object is checked."""
        location = self.shards[0].fragment.location
        blocks = list(side_by_side(location, lambda shard: shard.columns(*COLUMNS), self.shards))
        tables = side_by_side(location, lambda shard: shard.table().take(shard.rows), self.shards)
        z = [shard.fragment.dequantized(block["z"]) for shard, block in zip(self.shards, blocks, strict=True)]
        label, psnr, augmentation = (
            np.concatenate([block[name] for block in blocks]) for name in ("label", "psnr", "augmentation")
        )
        return Rows([key for table in tables for key in table.keys], label, psnr, augmentation, np.concatenate(z))


def parts(functaset: Functaset, split: str) -> list[Part]:
    """Return the parts of a split, in its order."""
    groups = list(_groups(functaset.shards(split)))
    firsts = np.cumsum([0, *(sum(shard.count for shard in group) for group in groups)])
    return [
        Part(split, number, len(groups), int(first), tuple(group))
        for number, (group, first) in enumerate(zip(groups, firsts, strict=False))
    ]


def _groups(shards: list[Shard]) -> Iterator[list[Shard]]:
    group, size = list[Shard](), 0
    for shard in (shard for shard in shards if shard.count):
        weight = 4 * shard.count * shard.fragment.plan.dims
        if group and size + weight > PART_BYTES:
            yield group
            group, size = [], 0
        group.append(shard)
        size += weight
    if group:
        yield group
