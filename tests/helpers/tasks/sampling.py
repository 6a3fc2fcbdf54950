"""A small denoiser as a training saves it, and jobs that sample from it."""

import torch

from functa.models.config import DenoiserConfig, DiffusionConfig
from functa.models.latents.denoiser import build_denoiser
from functa.storage.places.address import open_location
from functa.storage.runs.checkpoints import save_checkpoint
from functa.tasks.inference.sample import SampleJob

PROCESS = DiffusionConfig(timesteps=20, sampling_steps=5, clip=3.0)


def save_denoiser(folder: str, time_numbers: int | None = None, **trained: str) -> str:
    """Save a denoiser that was trained with these settings; return its folder. Its first multiplier is 2."""
    torch.manual_seed(0)
    config = DenoiserConfig(channels=32, multipliers=(2,), groups=4, head_channels=32)
    model = build_denoiser(config, (2, 2, 4), 3, time_numbers)
    for parameter in model.parameters():  # an untrained denoiser predicts zero
        parameter.data += 0.02 * torch.randn_like(parameter)
    metadata = {
        "model": config.model_dump(mode="json"), "latent_shape": [2, 2, 4], "classes": 3, "process": {},
        "finished": True, "config": trained,
        "normalizer": {"mean": [[[0.5] * 4]], "scale": [[[2.0] * 4]]},
    }  # fmt: skip
    weights = {f"model.{k}": v.numpy() for k, v in model.state_dict().items()}
    save_checkpoint(open_location(folder), 1, weights, metadata)
    return folder


def sample_job(denoiser: str, output: str, start: int, count: int, batch: int = 4) -> SampleJob:
    """Return the job that draws samples start to start + count, of the classes in turn."""
    labels = tuple((start + i) % 3 for i in range(count))
    return SampleJob(
        denoiser=denoiser, process=PROCESS, seed=5, start=start, labels=labels, count=count, batch=batch,
        device="cpu", output=output,
    )  # fmt: skip
