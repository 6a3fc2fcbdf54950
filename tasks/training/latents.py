"""Latents of a functaset for training and measuring: normalised, with labels."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.config import NormalizationConfig
from models.normalize import Affine, Normalizer, normalizer
from storage.functaset import Functaset
from storage.resident import Resident
from storage.shards import SplitShards


@dataclass(frozen=True)
class Split:
    """z [n, s, s, c] float32 as stored (dequantised), labels int64 [n]."""

    z: Tensor
    labels: Tensor


def load_split(functaset: Functaset, split: str) -> Split:
    """A split's latents and labels."""
    latents = functaset.load(split)
    return Split(torch.from_numpy(latents.dequantized()), torch.from_numpy(latents.labels.astype(np.int64)))


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


def load_training(functaset: Functaset, normalizer: Normalizer, device: torch.device) -> TrainingLatents:
    """The training split, in memory on the device, in the store's order."""
    reader = Resident(SplitShards(functaset, "train"))
    stored, labels = torch.from_numpy(reader.z), torch.from_numpy(reader.labels.astype(np.int64)).to(device)
    if not reader.quantizers:
        return TrainingLatents(normalizer.normalize(stored).to(device), labels, None, None)
    which = None if reader.which is None else torch.from_numpy(reader.which.astype(np.int64)).to(device)
    return TrainingLatents(stored.to(device), labels, normalizer.fused(*reader.affine).to(device), which)


def training_normalizer(functaset: Functaset, config: NormalizationConfig) -> Normalizer:
    """From the moments of the training split, which the functaset's commit carries."""
    moments = functaset.moments()
    return normalizer(config, moments.mean, moments.var)
