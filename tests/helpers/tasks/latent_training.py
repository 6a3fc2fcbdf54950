"""Small training runs of classifiers and diffusion models on a functaset."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from functa.flows.config.load import load_config
from functa.storage.places.address import open_location
from functa.storage.runs.checkpoints import load_checkpoint
from functa.tasks.training import classifier, diffusion
from functa.tasks.training_jobs import ClassifierJob, DiffusionJob

COMMON: dict[str, Any] = {"seed": 0, "device": "cpu", "digest": "d", "classes": 10}
SETTINGS = {
    "classifier": ["steps=9", "warmup=3", "batch=6", "ema=0.9", "ema_ramp=true", "noise=0.1", "log_every=3",
                   "model.width=16", "model.depth=1", "model.heads=2", "model.dropout=0.2", "evaluate_every=3",
                   "normalization.kind=fixed", "normalization.factor=0.05"],
    "diffusion": ["steps=9", "warmup=3", "batch=6", "ema=0.9", "decay=inverse_sqrt", "log_every=3",
                  "model.channels=32", "model.groups=4", "model.head_channels=32", "model.multipliers=[1]",
                  "model.dropout=0.2", "process.timestep_ratio=3", "process.weighted=true"],
    "vector": ["steps=9", "warmup=3", "batch=6", "ema=0.9", "log_every=3", "model.kind=mlp", "model.channels=64",
               "process.conditional=false", "process.guidance=1"],
    "edm": ["steps=9", "warmup=3", "batch=6", "ema=0.9", "log_every=3", "model.kind=mlp", "model.channels=64",
            "normalization.gamma=2", "process.kind=edm", "process.sampler=heun", "process.sampling_steps=4"],
    "flow": ["steps=9", "warmup=3", "batch=6", "ema=0.9", "log_every=3", "model.channels=32", "model.groups=4",
             "model.head_channels=32", "model.multipliers=[2]", "process.kind=flow", "process.sampler=heun",
             "process.conditional=false", "process.sampling_steps=4"],
}  # fmt: skip


def training_job(kind: str, functaset: str, output: Path, *more: str) -> ClassifierJob | DiffusionJob:
    """Return the job of 9 steps of this kind, with these settings changed."""
    section = "classifier" if kind == "classifier" else "diffusion"
    chosen = [*SETTINGS[kind], "checkpoint_seconds=1e-9", *more]
    config = load_config("digits", [f"{section}.{each}" for each in chosen])
    common = COMMON | {"functaset": functaset, "output": str(output)}
    if section == "classifier":
        return ClassifierJob(**common, classifier=config.classifier)
    return DiffusionJob(**common, diffusion=config.diffusion)


def run_training(
    job: ClassifierJob | DiffusionJob, emit: Callable[[dict[str, Any]], None] = lambda row: None
) -> dict[str, Any]:
    """Run the job in this process; return its figures."""
    return classifier.run(job, emit) if isinstance(job, ClassifierJob) else diffusion.run(job, emit)


def stored_tensors(output: Path) -> dict[str, np.ndarray]:
    """Return all tensors of the newest checkpoint."""
    found = load_checkpoint(open_location(str(output)))
    assert found is not None
    return found.tensors
