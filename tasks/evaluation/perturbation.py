"""Perturbation: how single latent numbers change the image (App. B.3 and C.5), and how they are spread (Fig. 8).

Locality; one channel moved everywhere, or one entry of a vector.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from functa.models.compute.device import choose_device
from functa.models.compute.randomness import mix, stage_number
from functa.models.field.field import Field
from functa.models.measures.perturbation import (
    channel_effects,
    entry_effects,
    even_share,
    linear_fit,
    locality,
    reference_grid,
)
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.receipts.moments import Moments
from functa.tasks.evaluation.config import PerturbationConfig
from functa.tasks.evaluation.evaluator_input import SILENT, EvaluationJob, Messages, write_arrays
from functa.tasks.inputs.latents import PlainRows
from functa.tasks.inputs.pictures import as_uint8, spread
from functa.tasks.trained import field_of

Arrays = dict[str, np.ndarray]

# Where the config does not give a number of channels: at most so many, of all pictures together so many pixels, and at
# least so many channels.
CHANNELS, PIXELS, LEAST_CHANNELS = 64, 1 << 24, 8


@dataclass(frozen=True)
class Subject:
    """The field as a decoder, latents z [n, s, s, c] of test images to perturb, the training latents' sd [s, s, c]."""

    field: Field
    resolution: tuple[int, int]
    device: torch.device
    z: Tensor
    sd: Tensor
    config: PerturbationConfig
    decoded: Callable[[], None]  # called after every decode

    def decode(self, z: Tensor) -> Tensor:
        """Decode to images [n, H, W, ch], unclamped, on the CPU."""
        with torch.no_grad():
            images = self.field(z.to(self.device), self.resolution).cpu()
        self.decoded()
        return images

    @property
    def channels(self) -> np.ndarray:
        """Choose the channels that are perturbed one by one: those asked for, else fewer of large images."""
        if self.config.channels is not None:
            return spread(self.z.shape[-1], self.config.channels)
        times = 1 if self.z.shape[1] == 1 else len(self.config.strengths)  # that a channel is perturbed
        pixels = len(self.z) * times * math.prod(self.resolution)
        return spread(self.z.shape[-1], min(CHANNELS, max(LEAST_CHANNELS, PIXELS // pixels)))

    @property
    def positions(self) -> np.ndarray:
        """Choose the latent positions that are perturbed one by one."""
        return spread(self.z.shape[1] ** 2, self.config.positions)

    @property
    def decodings(self) -> int:
        """Count the calls of decode that measuring takes, the pictures of the report included."""
        if self.z.shape[1] == 1:
            return 1 + len(self.channels) + 1 + 3
        return 1 + len(self.positions) + 1 + len(self.channels) * len(self.config.strengths) + 3


def measure(job: EvaluationJob, messages: Messages = SILENT) -> dict[str, Any]:
    """Measure locality, perturbation{} and latent_sd, the root of the mean variance of the training latents.

    Progress is the number of decoded batches of perturbed latents.
    """
    functaset = Functaset.open(job.functaset)
    moments = functaset.moments()
    _write_spread(job, moments)
    done = itertools.count(1)
    subject = _subject(
        job, functaset, moments, lambda: messages.progress("perturbed batches", next(done), subject.decodings)
    )
    figures, arrays = _of_vectors(subject) if subject.field.config.spatial == 1 else _of_grids(subject, job.seed)
    write_arrays(job.output, "perturbation", **arrays)
    return figures | {"latent_sd": float(np.sqrt(moments.var.mean()))}


def _write_spread(job: EvaluationJob, moments: Moments) -> None:
    """Write mean and sd per channel over positions and images (Fig. 8), from the moments in the commit."""
    mean = moments.mean.mean((0, 1))
    sd = np.sqrt(moments.var.mean((0, 1)) + moments.mean.var((0, 1)))
    write_arrays(job.output, "latents", mean=mean, sd=sd, images=np.array(moments.count))


def _subject(job: EvaluationJob, functaset: Functaset, moments: Moments, decoded: Callable[[], None]) -> Subject:
    device = choose_device(job.device)
    field, _, resolution = field_of(functaset)
    config = job.evaluation.perturbation
    assert config is not None  # else the evaluator is left out
    latents = PlainRows(functaset, "test")
    z = latents.read(spread(len(latents), config.images))
    sd = torch.from_numpy(np.sqrt(moments.var)).float()
    return Subject(field.to(device), (resolution, resolution), device, z, sd, config, decoded)


def _of_grids(subject: Subject, seed: int) -> tuple[dict[str, Any], Arrays]:
    """Measure locality by position, and move each channel everywhere (Figs. 12, 13)."""
    z, config, s = subject.z, subject.config, subject.field.config.spatial
    generator = torch.Generator().manual_seed(mix(seed, stage_number("perturbation")))
    shares = locality(subject.decode, z, subject.sd, subject.positions.tolist(), generator)
    effects = channel_effects(subject.decode, z, subject.channels.tolist(), config.strengths, s)
    slope, r2 = linear_fit(torch.tensor(config.strengths), effects.rmse)
    shown = int(subject.channels[_middle(slope)]) if config.show_channel is None else config.show_channel
    figures = {
        "locality": shares.nanmean().item(),
        "perturbation": {
            "linear_r2": r2.nanmedian().item(),
            "stability_patches": effects.between_patches.nanmean().item(),
            "stability_images": effects.between_images.nanmean().item(),
        },
    }
    everywhere = z.clone()
    everywhere[..., shown] += max(config.strengths)
    there = z.clone()
    row = column = s // 2
    there[:, row, column] += subject.sd[row, column]
    arrays = {
        "channels": subject.channels, "strengths": np.array(config.strengths), "rmse": effects.rmse.numpy(),
        "slope": slope.numpy(), "r2": r2.numpy(), "between_patches": effects.between_patches.numpy(),
        "between_images": effects.between_images.numpy(), "shown": np.array(shown),
        "asked": np.array(config.show_channel is not None), "locality": shares.numpy(),
        "unperturbed": as_uint8(subject.decode(z)), "channel": as_uint8(subject.decode(everywhere)),
        "position": as_uint8(subject.decode(there)), "spatial": np.array(s),
    }  # fmt: skip
    return _finite(figures), arrays


def _of_vectors(subject: Subject) -> tuple[dict[str, Any], Arrays]:
    """Move each entry by its sd: error by entry, and the largest share in a patch (Fig. 4) where there are several."""
    z, config = subject.z, subject.config
    entries, grid = subject.channels, reference_grid(subject.resolution, config.grid)
    effects = entry_effects(subject.decode, z, subject.sd, entries.tolist(), grid)
    mae = effects.mae.mean(1)  # [entries]
    chosen = {"largest": int(mae.argmax()), "median": _middle(mae), "lowest": int(mae.argmin())}
    figures: dict[str, Any] = {
        "perturbation": {f"mae_{name}": 255 * mae[index].item() for name, index in chosen.items()}
    }
    if grid > 1:
        figures["locality"] = effects.largest_share.nanmean().item()
    arrays = {
        "entries": entries, "mae": 255 * mae.numpy(), "locality": effects.largest_share.numpy(),
        "grid": np.array(grid), "even": np.array(even_share(subject.resolution, grid)),
        "unperturbed": as_uint8(subject.decode(z)),
    }  # fmt: skip
    for name, index in chosen.items():
        moved = z.clone()
        moved[..., entries[index]] += subject.sd[..., entries[index]]
        arrays[name] = as_uint8(subject.decode(moved))
        arrays[f"{name}_entry"] = entries[index]
    return _finite(figures), arrays


def _middle(values: Tensor) -> int:
    """Return the index of the median, the lower of two."""
    return int(values.argsort()[(len(values) - 1) // 2])


def _finite(figures: dict[str, Any]) -> dict[str, Any]:
    """Leave out figures without a finite value: of a field that ignores its latents, or of a single image."""
    kept = {key: _finite(value) if isinstance(value, dict) else value for key, value in figures.items()}
    return {key: value for key, value in kept.items() if isinstance(value, dict) or np.isfinite(value)}
