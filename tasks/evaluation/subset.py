"""Latents of some images of a functaset beside the images: read from the store, or encoded anew."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from functa.storage.functaset.plan import RowTable
from functa.storage.functaset.shards.shard import Shard
from functa.storage.images.source import ImageSplit
from functa.tasks.evaluation.evaluator_input import Bench
from functa.tasks.inputs.pictures import Pictures, spread

SHARDS = 8  # that a subset is read from: rows lie in the order of their ids, so the first of each are as good as any

ENCODED = 64  # images at a time


@dataclass(frozen=True, eq=False)
class Subset:
    """Latents float32 [n, s, s, c], and the images' rows int64 [n] in their Pictures."""

    z: Tensor
    rows: np.ndarray
    pictures: Pictures

    def __len__(self) -> int:
        return len(self.rows)

    def pixels(self, rows: np.ndarray) -> Tensor:
        """Return the images of these rows of the subset, float32 [k, H, W, ch]."""
        return self.pictures.batch(self.rows[rows])


def stored_subset(bench: Bench, split: str, count: int) -> Subset:
    """Read latents as readers see them, of up to about `count` images from shards spread over the split.

    Augmented versions are left out, and images that are missing or changed since.
    """
    pictures = bench.training if split == "train" else bench.test
    known, today = ({key: row for row, key in enumerate(keys)} for keys in (pictures.keys, pictures.split.keys))
    shards, latents, rows = bench.functaset.shards(split), [], []
    shard_rows = min(shard.fragment.plan.shard_rows for shard in shards)
    chosen = spread(len(shards), max(SHARDS, -(-count // shard_rows)))
    for shard in (shards[i] for i in chosen):
        table = shard.table()
        seen = np.flatnonzero(shard.visible & (table.augmentations == 0))
        asked = [int(i) for i in seen if table.keys[i] in known][: -(-count // len(chosen))]
        changed = set(changed_rows(shard, table, asked, pictures.split, today))
        kept = [i for i in asked if i not in changed]
        latents.append(shard.fragment.dequantized(shard.array("z")[kept]))
        rows += [known[table.keys[i]] for i in kept]
    return Subset(torch.from_numpy(np.concatenate(latents)), np.array(rows, np.int64), pictures)


def changed_rows(
    shard: Shard, table: RowTable, rows: Sequence[int], split: ImageSplit, today: Mapping[str, int]
) -> list[int]:
    """Return a shard's rows whose images have other bytes than when they were encoded; `today`: row by key in split.

    Only images with another token are read.
    """
    other = [row for row in rows if table.tokens[row] != split.tokens[today[table.keys[row]]]]
    if not other:
        return []
    encoded = shard.array("source_sha256")[other]
    found = split.read([today[table.keys[row]] for row in other]).sha256
    return [row for row, differs in zip(other, (encoded != found).any(1), strict=True) if differs]


def float_subset(bench: Bench, split: str, count: int) -> Subset:
    """Return latents before quantisation: the stored ones if they are float32, else encoded anew."""
    if all(fragment.plan.quantization is None for fragment in bench.functaset.fragments):
        return stored_subset(bench, split, count)
    pictures = bench.training if split == "train" else bench.test
    rows = spread(len(pictures), count)
    loop = bench.loop.prepared(len(rows))
    parts = np.split(rows, range(ENCODED, len(rows), ENCODED))
    z = torch.cat([loop.encode(pictures.batch(part).to(bench.device)).cpu() for part in parts])
    return Subset(z, rows, pictures)


def bounded(count: int, bench: Bench, pixels: int) -> int:
    """Return how many of `count` images have at most `pixels` pixels together, but eight at least."""
    height, width = bench.test.resolution
    return min(count, max(8, pixels // (height * width)))
