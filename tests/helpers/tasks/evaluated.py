"""Small untrained inputs of the evaluators of samples: images, field, pixel classifier, functaset, samples."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from functa.flows.config.load import load_config
from functa.models.config import FieldConfig, InnerConfig
from functa.models.field.field import Field
from functa.models.latents.classifier import build_pixel_classifier
from functa.storage.config import QuantizationConfig
from functa.storage.images.source import open_images
from functa.storage.places.address import open_location
from functa.storage.runs.checkpoints import save_checkpoint
from functa.tasks.evaluation.evaluator_input import EvaluationJob, Samples
from functa.tasks.evaluation.generation.feature_inputs import write_inputs
from functa.tasks.evaluation.generation.features import FeatureJob, part_of, set_sizes, write_features
from tests.helpers.storage.functasets import SHAPE, filled

COUNT = 20  # the rows of `filled`'s training split


def evaluation_job(folder: Path, *settings: str) -> EvaluationJob:
    """Make a job whose field, pixel classifier and functaset exist; nothing is trained."""
    config = load_config("digits", ["images.limit=40", *(f"evaluation.{setting}" for setting in settings)])
    if not (folder / "field").exists():
        inner = InnerConfig(steps=2)
        field = Field(FieldConfig(spatial=2, channels=8, width=16, depth=3), inner, 1, resolution=(8, 8))
        described = {"field": field.config.model_dump(mode="json"), "inner": inner.model_dump(mode="json")}
        _save(folder / "field", field, described | {"resolution": 8, "image_channels": 1})
        torch.manual_seed(0)
        _save(folder / "pixels", build_pixel_classifier(8, 12, 1, 8, 10), {"model": [8, 12, 1, 8, 10]})
        filled(str(folder / "z"))
    return EvaluationJob(
        seed=0, images=config.images, quantization=QuantizationConfig(), evaluation=config.evaluation,
        calibration_images=8, functaset=str(folder / "z"), field=str(folder / "field"), diffusion="there",
        pixel_classifier=str(folder / "pixels"), spaces=("classifier", "latent", "wavelet"), output=str(folder / "run"),
        device="cpu",
    )  # fmt: skip


def _save(folder: Path, module: torch.nn.Module, metadata: dict[str, Any]) -> None:
    weights = {f"model.{name}": value.numpy() for name, value in module.state_dict().items()}
    save_checkpoint(open_location(str(folder)), 1, weights, {"finished": True} | metadata)


def write_samples(folder: Path, z: np.ndarray, size: int = 7) -> list[str]:
    """Write latents [n, s, s, c] as slices of samples; return the files."""
    location, uris = open_location(str(folder / "run" / "samples")), []
    for start in range(0, len(z), size):
        buffer, key = io.BytesIO(), f"latents-{start:06d}-{min(len(z), start + size):06d}.npy"
        np.save(buffer, z[start : start + size])
        location.write(key, buffer.getvalue())
        uris.append(f"{location.uri}/{key}")
    return uris


def with_samples(
    job: EvaluationJob, slices: Sequence[str], labels: Sequence[int] | None, features: Sequence[str] = ()
) -> EvaluationJob:
    """Return the job with the files of its samples."""
    drawn = Samples(slices=tuple(slices), labels=None if labels is None else tuple(labels), features=tuple(features))
    return job.model_copy(update={"samples": drawn})


def samples(count: int = COUNT, seed: int = 3) -> np.ndarray:
    """Make latents [n, s, s, c] that differ."""
    return np.random.default_rng(seed).normal(0, 0.3, (count, *SHAPE)).astype(np.float32)


def features(
    job: EvaluationJob, slices: list[str], parts: int = 1, labels: list[int] | None = None, count: int = COUNT
) -> list[str]:
    """Compute all sets' features, in so many slices each; return the files."""
    images = open_images(job.images)
    sizes = set_sizes(images, count)
    write_inputs(job.output, images, job.functaset, {kind: (rows, parts) for kind, rows in sizes.items()})
    return [
        write_features(FeatureJob(
            evaluation=job, kind=kind, part=part, parts=parts, count=count, images=rows,
            slices=tuple(slices),
            labels=None if labels is None else tuple(labels[row] for row in part_of(count, part, parts)),
        ))
        for kind, rows in sizes.items() for part in range(parts)
    ]  # fmt: skip
