"""Sample latents, in slices by index: each slice can be drawn, retried and merged independently."""

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from functa.models.compute.compilation import has_compiler
from functa.models.compute.compiled_function import graphed
from functa.models.compute.device import choose_device, matmul_precision
from functa.models.compute.randomness import mix, stage_number
from functa.models.config import Config, DenoiserConfig, DiffusionConfig
from functa.models.latents.cost import denoiser_cost
from functa.models.latents.diffusion import Denoise, sample
from functa.storage.places.address import open_location
from functa.tasks.trained import load_denoiser


class SampleJob(Config):
    """One slice of samples; sample i depends on (seed, i) and its label only."""

    denoiser: str  # URI of the checkpoint
    process: DiffusionConfig
    seed: int
    start: int
    labels: tuple[int, ...] | None  # of this slice; None for an unconditional model
    count: int
    batch: int
    device: str
    compile: Literal["auto", "on", "graphs", "off"] | None = None  # None: as the denoiser was trained
    output: str  # URI of the folder that the slice's file goes to


Progress = Callable[[int, int], None]  # (denoiser steps done, steps in all), over all batches


def sample_latents(job: SampleJob, progress: Progress = lambda done, total: None) -> Tensor:
    """Draw latents [count, s, s, c], denormalised, on the CPU."""
    return torch.cat(list(sample_batches(job, progress)))


def sample_batches(job: SampleJob, progress: Progress = lambda done, total: None) -> Iterator[Tensor]:
    """Yield the latents of sample_latents batch by batch, [n, s, s, c] each."""
    device = choose_device(job.device)
    model, normalizer, meta = load_denoiser(job.denoiser)
    denoise, size = _denoiser(model.to(device), job, meta, device)
    seeds = [mix(job.seed, stage_number("sample"), job.start + i) for i in range(job.count)]
    begins = range(0, job.count, size)
    for number, begin in enumerate(begins):
        rows = [min(row, job.count - 1) for row in range(begin, begin + size)]  # padded: a graph has one shape
        labels = None if job.labels is None else torch.tensor([job.labels[row] for row in rows], device=device)

        def steps(done: int, total: int, number: int = number) -> None:
            progress(number * total + done, len(begins) * total)

        x = sample(
            denoise,
            job.process,
            tuple(meta["latent_shape"]),
            labels,
            [seeds[row] for row in rows],
            meta["classes"],
            device,
            progress=steps,
        )
        yield normalizer.denormalize(x.cpu())[: job.count - begin]


def _denoiser(model: nn.Module, job: SampleJob, meta: dict[str, Any], device: torch.device) -> tuple[Denoise, int]:
    """Return the denoiser in its training precision, compiled if the work is enough, and the batch size."""
    trained, size = meta.get("config", {}), min(job.batch, job.count)
    halves = 1 if meta["classes"] is None or job.process.guidance in (0, 1) else 2
    model_config = DenoiserConfig.model_validate(meta["model"])
    one = size * denoiser_cost(model_config, tuple(meta["latent_shape"]), meta["classes"]).flops
    work = float(one * halves * job.process.calls * -(-job.count // size))
    precision = trained.get("precision", "float32")
    mode = _compilation(job.compile or trained.get("compile", "auto"), device)
    function, _ = graphed(model, precision, mode, work, device, "diffusion.compile")

    def denoise(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        with matmul_precision(precision):  # what decodes the samples has a precision of its own
            noise = function(x, t, labels)
        return noise.clone() if mode == "graphs" else noise  # a CUDA graph's next run overwrites its last output

    return denoise, size


def _compilation(trained: str, device: torch.device) -> str:
    """Choose how to compile: this machine may lack what the training's machine had."""
    if trained == "graphs" and device.type == "cuda" and has_compiler(device):
        return "graphs"
    return "off" if trained == "off" else "auto"


def write_slice(job: SampleJob, progress: Progress = lambda done, total: None) -> str:
    """Draw the slice and write it as one .npy file; return its URI. An existing file is kept."""
    location, key = open_location(job.output), f"latents-{job.start:06d}-{job.start + job.count:06d}.npy"
    if not location.exists(key):
        buffer = io.BytesIO()
        np.save(buffer, sample_latents(job, progress).numpy(), allow_pickle=False)
        location.write(key, buffer.getvalue())
    return f"{job.output}/{key}"


def read_samples(uris: Sequence[str], start: int, stop: int) -> np.ndarray:
    """Read samples start to stop of all slices in order, only from files that hold some: float32 [n, s, s, c]."""
    parts = []
    for uri in uris:
        numbers = uri.removesuffix(".npy").rsplit("-", 2)[1:]  # as write_slice names them
        first, end = map(int, numbers)
        if first < stop and end > start:
            parts.append(read_slices([uri])[max(0, start - first) : stop - first])
    return np.concatenate(parts)


def read_slices(uris: Sequence[str]) -> np.ndarray:
    """Read all slices in order: float32 [n, s, s, c]."""
    parts = []
    for uri in uris:
        folder, _, key = uri.rpartition("/")
        parts.append(np.load(io.BytesIO(open_location(folder).read(key)), allow_pickle=False))
    return np.concatenate(parts)
