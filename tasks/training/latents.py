"""Latents of a functaset for training and measuring: normalised, with labels."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.config import NormalizationConfig
from models.normalize import Affine, Normalizer, normalizer
from storage.functaset import Functaset
from storage.moments import Moments, merge, moments_of
from storage.resident import Resident
from storage.shards import Shard, SplitShards


@dataclass(frozen=True)
class Split:
    """z [n, s, s, c] float32 as stored (dequantised), labels int64 [n]."""

    z: Tensor
    labels: Tensor


def load_split(functaset: Functaset, split: str) -> Split:
    """Latents and labels of a split's images as they are: of their augmentations none."""
    latents = functaset.load(split)
    rows = np.flatnonzero(latents.augmentation == 0)
    z = latents.dequantized() if len(rows) == len(latents) else latents.dequantized(rows)
    return Split(torch.from_numpy(z), torch.from_numpy(latents.labels[rows].astype(np.int64)))


@dataclass(frozen=True)
class TrainingLatents:
    """A split on the device: codes, a byte a number, or normalised float32; labels int64 [n] beside them."""

    stored: Tensor  # [n, s, s, c]
    labels: Tensor
    affine: Affine | None  # of codes: what makes them normalised latents
    which: Tensor | None  # int64 [n]: which quantiser's codes, where there are several

    def __len__(self) -> int:
        return len(self.labels)

    def __call__(self, rows: Tensor) -> Tensor:
        """Normalised latents float32 [b, s, s, c] of the rows."""
        stored = self.stored[rows]
        if self.affine is None:
            return stored
        return self.affine(stored, None if self.which is None else self.which[rows])


def load_training(
    functaset: Functaset, normalizer: Normalizer, device: torch.device, plain: bool = False
) -> TrainingLatents:
    """The training split, in memory on the device, in the store's order; plain: without the images' augmentations."""
    reader = Resident(SplitShards(functaset, "train", plain))
    stored, labels = torch.from_numpy(reader.z), torch.from_numpy(reader.labels.astype(np.int64)).to(device)
    if not reader.quantizers:
        return TrainingLatents(normalizer.normalize(stored).to(device), labels, None, None)
    which = None if reader.which is None else torch.from_numpy(reader.which.astype(np.int64)).to(device)
    return TrainingLatents(stored.to(device), labels, normalizer.fused(*reader.affine).to(device), which)


def training_normalizer(functaset: Functaset, config: NormalizationConfig, plain: bool = False) -> Normalizer:
    """From the moments of the training split, which the functaset's commit carries.

    plain: of the images as they are; where there are augmentations beside them, the latents are read for it.
    """
    augmented = "augmentation.count" in functaset.fingerprint
    moments = _plain_moments(functaset) if plain and augmented else functaset.moments()
    return normalizer(config, moments.mean, moments.var)


def _plain_moments(functaset: Functaset) -> Moments:
    split = SplitShards(functaset, "train", plain=True)

    def of(shard: Shard) -> Moments:
        z = split.read(shard, ids=False).z
        return moments_of(shard.quantizer.decode(z) if shard.quantizer is not None and split.quantizers else z)

    return merge((of(shard) for shard in split.shards), functaset.latent_shape)
