"""Sampling of latents, sliced by index: any slice can be made, retried and merged on its own."""

import io
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from models.config import Config, DiffusionConfig
from models.diffusion import sample
from storage.locations import open_location
from tasks.training.device import choose_device
from tasks.training.diffusion import load_denoiser
from tasks.training.seeds import mix, stage_number


class SampleJob(Config):
    """One slice of samples; sample i depends on (seed, i) and its label alone."""

    denoiser: str  # URI of the checkpoint
    process: DiffusionConfig
    seed: int
    start: int
    labels: tuple[int, ...] | None  # of this slice; None for an unconditional model
    count: int
    batch: int
    device: str
    output: str  # URI of the folder that the slice's file goes to


Progress = Callable[[int, int], None]


def sample_latents(job: SampleJob, progress: Progress = lambda done, total: None) -> Tensor:
    """Latents [count, s, s, c], denormalised, on the CPU. `progress` is told samples' worth of work done, and all."""
    device = choose_device(job.device)
    model, normalizer, meta = load_denoiser(job.denoiser)
    model.to(device)
    seeds = [mix(job.seed, stage_number("sample"), job.start + i) for i in range(job.count)]
    parts = []
    for begin in range(0, job.count, job.batch):
        labels = None if job.labels is None else torch.tensor(job.labels[begin : begin + job.batch], device=device)

        def steps(done: int, total: int, begin: int = begin) -> None:
            size = min(job.batch, job.count - begin)
            progress(begin + size * done // total, job.count)

        x = sample(
            model,
            job.process,
            tuple(meta["latent_shape"]),
            labels,
            seeds[begin : begin + job.batch],
            meta["classes"],
            device,
            progress=steps,
        )
        parts.append(normalizer.denormalize(x.cpu()))
    return torch.cat(parts)


def write_slice(job: SampleJob, progress: Progress = lambda done, total: None) -> str:
    """Samples the slice and writes it as one .npy file; returns its URI. What stands is kept."""
    location, key = open_location(job.output), f"latents-{job.start:06d}-{job.start + job.count:06d}.npy"
    if not location.exists(key):
        buffer = io.BytesIO()
        np.save(buffer, sample_latents(job, progress).numpy(), allow_pickle=False)
        location.write(key, buffer.getvalue())
    return f"{job.output}/{key}"


def read_slices(uris: Sequence[str]) -> np.ndarray:
    """All slices in order: float32 [n, s, s, c]."""
    parts = []
    for uri in uris:
        folder, _, key = uri.rpartition("/")
        parts.append(np.load(io.BytesIO(open_location(folder).read(key)), allow_pickle=False))
    return np.concatenate(parts)
