"""Latents of a functaset for training and measuring: normalised, with labels, in memory."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.config import NormalizationConfig
from models.normalize import Normalizer, normalizer
from storage.functaset import Functaset


@dataclass(frozen=True)
class Split:
    """z [n, s, s, c] float32 as stored (dequantised), labels int64 [n]."""

    z: Tensor
    labels: Tensor


def load_split(functaset: Functaset, split: str) -> Split:
    """A split's latents and labels."""
    latents = functaset.load(split)
    return Split(torch.from_numpy(latents.dequantized()), torch.from_numpy(latents.labels.astype(np.int64)))


def training_normalizer(functaset: Functaset, config: NormalizationConfig) -> Normalizer:
    """From the moments of the training split, which the functaset's commit carries."""
    moments = functaset.moments()
    return normalizer(config, moments.mean, moments.var)
