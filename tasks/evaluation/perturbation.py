"""What latent numbers do to the image: locality, one channel everywhere or one entry of a vector (App. B.3 and C.5);
and how they are spread (Fig. 8)."""

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
from functa.storage.functaset.moments import Moments
from functa.tasks.evaluation.bench import EvaluationJob, Progress, silent, write_arrays
from functa.tasks.evaluation.config import PerturbationConfig
from functa.tasks.inputs.latents import PlainRows
from functa.tasks.inputs.pictures import as_uint8, spread
from functa.tasks.trained import field_of

Arrays = dict[str, np.ndarray]

PIXELS, LEAST_CHANNELS = 1 << 24, 8  # of all pictures of channels together; channels at least


@dataclass(frozen=True)
class Subject:
    """The field as a decoder, latents z [n, s, s, c] of test images to perturb, the training latents' sd [s, s, c]."""

    field: Field
    resolution: tuple[int, int]
    device: torch.device
    z: Tensor
    sd: Tensor
    config: PerturbationConfig
    decoded: Callable[[], None]  # is told of every call of decode

    def decode(self, z: Tensor) -> Tensor:
        """Images [n, H, W, ch], unclamped, on the CPU."""
        with torch.no_grad():
            images = self.field(z.to(self.device), self.resolution).cpu()
        self.decoded()
        return images

    @property
    def channels(self) -> np.ndarray:
        """Channels that are perturbed one by one: fewer of large images, eight at least."""
        pixels = len(self.z) * len(self.config.strengths) * math.prod(self.resolution)
        return spread(self.z.shape[-1], min(self.config.channels, max(LEAST_CHANNELS, PIXELS // pixels)))

    @property
    def positions(self) -> np.ndarray:
        """Latent positions that are perturbed one by one."""
        return spread(self.z.shape[1] ** 2, self.config.positions)

    @property
    def decodings(self) -> int:
        """Calls of decode that measuring takes, the pictures of the report included."""
        if self.z.shape[1] == 1:
            return 1 + len(self.channels) + 1 + 3
        return 1 + len(self.positions) + 1 + len(self.channels) * len(self.config.strengths) + 3


def measure(job: EvaluationJob, progress: Progress = silent) -> dict[str, Any]:
    """locality, perturbation{}; latent_sd, the root of the mean variance of the training latents.

    `progress` is told of decoded batches of perturbed latents.
    """
    functaset = Functaset.open(job.functaset)
    moments = functaset.moments()
    _write_spread(job, moments)
    done = itertools.count(1)
    subject = _subject(
        job, functaset, moments, lambda: progress("batches of perturbed latents", next(done), subject.decodings)
    )
    figures, arrays = _of_vectors(subject) if subject.field.config.spatial == 1 else _of_grids(subject, job.seed)
    write_arrays(job.output, "perturbation", **arrays)
    return figures | {"latent_sd": float(np.sqrt(moments.var.mean()))}


def _write_spread(job: EvaluationJob, moments: Moments) -> None:
    """Mean and sd per channel over positions and images (Fig. 8), from the moments that the commit carries."""
    mean = moments.mean.mean((0, 1))
    sd = np.sqrt(moments.var.mean((0, 1)) + moments.mean.var((0, 1)))
    write_arrays(job.output, "latents", mean=mean, sd=sd, images=np.array(moments.count))


def _subject(job: EvaluationJob, functaset: Functaset, moments: Moments, decoded: Callable[[], None]) -> Subject:
    device = choose_device(job.device)
    field, _, resolution = field_of(functaset)
    config = job.evaluation.perturbation
    latents = PlainRows(functaset, "test")
    z = latents.read(spread(len(latents), config.images))
    sd = torch.from_numpy(np.sqrt(moments.var)).float()
    return Subject(field.to(device), (resolution, resolution), device, z, sd, config, decoded)


def _of_grids(subject: Subject, seed: int) -> tuple[dict[str, Any], Arrays]:
    """Locality by position, and each channel moved everywhere (Figs. 12, 13)."""
    z, config, s = subject.z, subject.config, subject.field.config.spatial
    generator = torch.Generator().manual_seed(mix(seed, stage_number("perturbation")))
    shares = locality(subject.decode, z, subject.sd, subject.positions.tolist(), generator)
    effects = channel_effects(subject.decode, z, subject.channels.tolist(), config.strengths, s)
    slope, r2 = linear_fit(torch.tensor(config.strengths), effects.rmse)
    shown = int(subject.channels[_middle(slope)])
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
        "between_images": effects.between_images.numpy(), "shown": np.array(shown), "locality": shares.numpy(),
        "unperturbed": as_uint8(subject.decode(z)), "channel": as_uint8(subject.decode(everywhere)),
        "position": as_uint8(subject.decode(there)), "spatial": np.array(s),
    }  # fmt: skip
    return _finite(figures), arrays


def _of_vectors(subject: Subject) -> tuple[dict[str, Any], Arrays]:
    """Each entry moved by its sd: error by entry, the largest share in a patch (Fig. 4) where there are several."""
    z, config = subject.z, subject.config
    entries, grid = subject.channels, reference_grid(subject.resolution, config.grid)
    effects = entry_effects(subject.decode, z, subject.sd, entries.tolist(), grid)
    mae = effects.mae.mean(1)  # [entries]
    chosen = {"largest": int(mae.argmax()), "median": _middle(mae), "lowest": int(mae.argmin())}
    figures: dict[str, Any] = {
        "perturbation": {f"mae_{name}": 255 * mae[place].item() for name, place in chosen.items()}
    }
    if grid > 1:
        figures["locality"] = effects.largest_share.nanmean().item()
    arrays = {
        "entries": entries, "mae": 255 * mae.numpy(), "locality": effects.largest_share.numpy(),
        "grid": np.array(grid), "even": np.array(even_share(subject.resolution, grid)),
        "unperturbed": as_uint8(subject.decode(z)),
    }  # fmt: skip
    for name, place in chosen.items():
        moved = z.clone()
        moved[..., entries[place]] += subject.sd[..., entries[place]]
        arrays[name] = as_uint8(subject.decode(moved))
        arrays[f"{name}_entry"] = entries[place]
    return _finite(figures), arrays


def _middle(values: Tensor) -> int:
    """Place of the median, the lower of two."""
    return int(values.argsort()[(len(values) - 1) // 2])


def _finite(figures: dict[str, Any]) -> dict[str, Any]:
    """Without the figures that nothing stood behind: of a field that ignores its latents, or of a single image."""
    kept = {key: _finite(value) if isinstance(value, dict) else value for key, value in figures.items()}
    return {key: value for key, value in kept.items() if isinstance(value, dict) or np.isfinite(value)}
