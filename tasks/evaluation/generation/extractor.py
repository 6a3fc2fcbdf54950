"""Features of images or latents: what a feature space computes, and the spaces that need no network from elsewhere."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from functa.models.latents.normalize import Normalizer
from functa.models.measures.wavelets import haar_packets, packet_level, packet_numbers
from functa.tasks.evaluation.evaluator_input import EvaluationJob
from functa.tasks.inputs.pictures import as_float, as_uint8
from functa.tasks.trained import load_pixel_classifier


@dataclass(frozen=True)
class Extractor:
    """The opened features of one space."""

    compute: Callable[[Tensor], Tensor]
    """Images [B, H, W, ch] in [0, 1], or latents [B, s, s, c] -> [B, D], or [B, P, D] in P groups, on the CPU."""
    dimensions: int
    """D, of each covariance."""
    groups: int = 1
    """P: the Frechet distance is the mean over as many covariances."""
    of_latents: bool = False
    protocol: Mapping[str, Any] = field(default_factory=dict)
    """What the features depend on beside the images: the same for slices that are merged."""


@dataclass(frozen=True)
class Setting:
    """The inputs of every extractor: the evaluation, the pictures' shape [H, W, ch], the latents' normaliser."""

    job: EvaluationJob
    device: torch.device
    shape: tuple[int, int, int]
    normalizer: Normalizer


def open_classifier(setting: Setting) -> Extractor:
    """Open the penultimate features of the pipeline's own pixel classifier."""
    model: Any = load_pixel_classifier(setting.job.pixel_classifier).to(setting.device)

    def compute(images: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = model.features(images.to(setting.device)).cpu()
        return found

    return Extractor(compute, model.penultimate.out_features)


def open_latent(setting: Setting) -> Extractor:
    """Open normalised latents, which are features as they are."""
    numbers = setting.normalizer.mean.numel()
    return Extractor(lambda z: setting.normalizer.normalize(z).flatten(1), numbers, of_latents=True)


def open_wavelet(setting: Setting) -> Extractor:
    """Open wavelet packets, whose distances give the Frechet Wavelet Distance; of bytes, as files hold them."""
    side, _, channels = setting.shape
    level = packet_level(side)
    return Extractor(
        lambda images: haar_packets(as_float(as_uint8(images.cpu())), level),
        packet_numbers(side, channels),
        groups=4**level,
        protocol={"wavelet": "Haar", "level": level},
    )
