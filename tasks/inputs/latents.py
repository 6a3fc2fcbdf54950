"""Latents of a functaset for training and evaluation, with labels and normaliser."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from functa.models.config import NormalizationConfig
from functa.models.latents.normalize import Normalizer, normalizer
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.receipts.moments import Moments, merge, moments_of
from functa.storage.functaset.shards.shard import Shard
from functa.storage.places.side_by_side import side_by_side
from functa.storage.readers.free_memory import free_memory
from functa.storage.readers.open import MEMORY_SHARE, open_reader
from functa.storage.readers.order import Order
from functa.storage.readers.reader import Batch
from functa.storage.readers.shards import SplitShards, plain_rows

FLOAT_COPIES = 3  # of a split: as read, joined, normalised


@dataclass(frozen=True)
class Split:
    """z [n, s, s, c] float32 as stored (dequantised), labels int64 [n]."""

    z: Tensor
    labels: Tensor


def load_split(functaset: Functaset, split: str) -> Split:
    """Load the latents and labels of a split's images, without augmentations."""
    latents = functaset.load(split)
    rows = np.flatnonzero(latents.augmentation == 0)
    z = latents.dequantized() if len(rows) == len(latents) else latents.dequantized(rows)
    return Split(torch.from_numpy(z), torch.from_numpy(latents.labels[rows].astype(np.int64)))


def plain_counts(functaset: Functaset, split: str) -> list[int]:
    """Return how many rows without augmentation each shard of a split has; every shard is opened for it."""
    return [shard.count for shard in side_by_side(functaset.location, plain_rows, functaset.shards(split))]


def fits_as_floats(functaset: Functaset, split: str) -> bool:
    """Return whether the images' latents fit into memory as `load_split` needs it: float32, with copies."""
    shards = SplitShards(functaset, split, plain=True)
    return FLOAT_COPIES * 4 * shards.rows * math.prod(shards.latent_shape) <= MEMORY_SHARE * free_memory()


class SplitParts:
    """The latents and labels of a split's images, a part after the other, read anew at each iteration."""

    def __init__(self, functaset: Functaset, split: str, rows: int = 1024) -> None:
        self._reader = open_reader(functaset, split, "streamed", buffer_shards=1, plain=True)
        self._order = Order(rows, shuffle=False)

    def __iter__(self) -> Iterator[Split]:
        for batch in self._reader.batches(self._order):
            z = self._reader.dequantized(batch)
            yield Split(torch.from_numpy(z), torch.from_numpy(batch.labels.astype(np.int64)))


class PlainRows:
    """The latents of a split's images without augmentations, in the store's order; reads only the shards it needs.

    counts: plain_counts of the same version, where they are known: then no shard is opened before it is read. Raises
    StorageError if the split has no rows.
    """

    def __init__(self, functaset: Functaset, split: str, counts: Sequence[int] | None = None) -> None:
        self._shards = SplitShards(functaset, split, plain=True, known=counts)
        self._ends = np.cumsum(self._shards.counts)
        self._held: tuple[int, Batch] | None = None  # the last shard: rows are read in order, batch by batch
        self.shape = functaset.latent_shape

    def __len__(self) -> int:
        return self._shards.rows

    @property
    def shards(self) -> list[Shard]:
        """Return the shards of the rows, in order."""
        return self._shards.shards

    def read(self, rows: np.ndarray) -> Tensor:
        """Return z [n, s, s, c] float32 of ascending rows."""
        return self.split(rows).z

    def split(self, rows: np.ndarray) -> Split:
        """Return latents and labels of ascending rows."""
        parts, labels = [np.empty((0, *self.shape), np.float32)], [np.empty(0, np.int64)]
        which = np.searchsorted(self._ends, rows, side="right")
        for number in np.unique(which):
            batch, fragment = self._shard(int(number)), self._shards.shards[number].fragment
            own = rows[which == number] - (self._ends[number] - self._shards.counts[number])
            parts.append(fragment.dequantized(batch.z[own]) if self._shards.quantizers else batch.z[own])
            labels.append(batch.labels[own].astype(np.int64))
        return Split(torch.from_numpy(np.concatenate(parts)), torch.from_numpy(np.concatenate(labels)))

    def _shard(self, number: int) -> Batch:
        if self._held is None or self._held[0] != number:
            self._held = number, self._shards.read(self._shards.shards[number], ids=False)
        return self._held[1]


def training_normalizer(functaset: Functaset, config: NormalizationConfig, plain: bool = False) -> Normalizer:
    """Return the normaliser from the moments of the training split, which the functaset's commit contains.

    plain: without augmentations; if the functaset has some, the latents are read to compute the moments.
    """
    augmented = "augmentation.count" in functaset.fingerprint
    moments = _plain_moments(functaset) if plain and augmented else functaset.moments()
    return normalizer(config, moments.mean, moments.var)


def _plain_moments(functaset: Functaset) -> Moments:
    split = SplitShards(functaset, "train", plain=True)

    def of(shard: Shard) -> Moments:
        z = split.read(shard, ids=False).z
        return moments_of(shard.fragment.dequantized(z) if split.quantizers else z)

    return merge((of(shard) for shard in split.shards), functaset.latent_shape)
