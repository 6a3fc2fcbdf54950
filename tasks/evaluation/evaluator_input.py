"""The input of every evaluator: where the run's outputs are, opened on demand, and where to report progress."""

import io
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from functa.models.compute.device import choose_device
from functa.models.config import Config, InnerConfig
from functa.models.field.field import Field
from functa.models.field.inner import InnerLoop, decode
from functa.storage.config import ImagesConfig, QuantizationConfig
from functa.storage.errors import DamagedObject, StorageError, one_line
from functa.storage.functaset.functaset import Functaset
from functa.storage.images.source import open_images
from functa.storage.places.address import open_location
from functa.tasks.evaluation.config import EvaluationConfig
from functa.tasks.inputs.pictures import Pictures
from functa.tasks.trained import load_field

Progress = Callable[[str, int, int], None]  # (what, done, total)


def _silent(what: str, done: int, total: int) -> None:
    """Ignore progress."""


@dataclass(frozen=True)
class Messages:
    """Functions that receive an evaluator's progress, and warnings for the reader of its figures."""

    progress: Progress = _silent
    warn: Callable[[str], None] = logging.getLogger(__name__).warning


SILENT = Messages()


class Samples(Config):
    """Samples of the diffusion model and the features computed from them, as files."""

    slices: tuple[str, ...]
    """URIs of the files of latents, in order."""
    labels: tuple[int, ...] | None = None
    """The class of each sample; None of an unconditional model."""
    features: tuple[str, ...] = ()
    """URIs of the files of write_features, of all sets."""


class EvaluationJob(Config):
    """Input of an evaluator, small and JSON: URIs of everything that is measured, empty if a stage has not run."""

    seed: int
    images: ImagesConfig
    quantization: QuantizationConfig
    evaluation: EvaluationConfig
    calibration_images: int
    functaset: str
    field: str
    classifier: str = ""
    diffusion: str = ""
    pixel_classifier: str = ""
    spaces: tuple[str, ...] = ()
    """The feature spaces in which samples are compared: chosen once, so that all workers compute the same."""
    samples: Samples | None = None
    sampling: dict[str, Any] = {}
    """The settings of the diffusion process by which samples are drawn."""
    output: str  # URI of the run's folder
    device: str


@dataclass(frozen=True)
class Bench:
    """The field, its functaset and the images, opened: most evaluators need these three."""

    job: EvaluationJob
    device: torch.device
    field: Field
    inner: InnerConfig
    functaset: Functaset
    training: Pictures
    test: Pictures

    @property
    def loop(self) -> InnerLoop:
        """Build the inner loop at the images' resolution, eager."""
        return InnerLoop(self.field, self.inner, self.training.resolution)

    def decode_raw(self, z: Tensor, batch: int = 256) -> Tensor:
        """Decode latents [n, s, s, c] to images [n, H, W, ch] on the CPU, unclamped: so functa defines PSNR."""
        with torch.no_grad():
            return torch.cat([self.field(part.to(self.device), self.test.resolution).cpu() for part in z.split(batch)])

    def decode(self, z: Tensor, batch: int = 256) -> Tensor:
        """Decode latents [n, s, s, c] to images [n, H, W, ch] in [0, 1], on the CPU."""
        resolution = self.training.resolution
        return torch.cat([decode(self.field, part.to(self.device), resolution).cpu() for part in z.split(batch)])


def open_bench(job: EvaluationJob) -> Bench:
    """Load the field, open the functaset and the images."""
    device = choose_device(job.device)
    field, inner, _ = load_field(job.field)
    images, functaset = open_images(job.images), Functaset.open(job.functaset)
    steps = functaset.fingerprint.get("inner.steps", inner.steps)  # the encoding may have taken more than the training
    return Bench(
        job=job,
        device=device,
        field=field.to(device),
        inner=inner.model_copy(update={"steps": steps}),
        functaset=functaset,
        training=Pictures(images, "train", job.images),
        test=Pictures(images, "test", job.images),
    )


def write_arrays(output: str, name: str, **arrays: np.ndarray) -> None:
    """Write arrays for the report as one .npz into the run's folder."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # numpy: any name but allow_pickle is an array's
    open_location(output).write(f"arrays/{name}.npz", buffer.getvalue())


def read_arrays(output: str, name: str) -> dict[str, Any]:
    """Return what write_arrays wrote; empty where it wrote nothing. Raises DamagedObject."""
    location, key = open_location(output), f"arrays/{name}.npz"
    if not location.exists(key):
        return {}
    try:
        with np.load(io.BytesIO(location.read(key)), allow_pickle=False) as archive:
            return dict(archive)
    except Exception as error:  # of zipfile, zlib and numpy, whatever their parsers raise
        if isinstance(error, StorageError):
            raise
        raise DamagedObject(f"{location.uri}/{key}: cannot be read ({one_line(error)[:100]}); evaluate again") from None


def all_arrays(output: str) -> dict[str, dict[str, np.ndarray]]:
    """Return everything that evaluators wrote into the run's folder, by name."""
    names = sorted(key.rpartition("/")[2] for key in open_location(output).list("arrays/"))
    return {name.removesuffix(".npz"): read_arrays(output, name.removesuffix(".npz")) for name in names}
