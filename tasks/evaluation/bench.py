"""What every evaluator of one run is given: where the run's outputs are. Small and JSON."""

import io
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
from functa.storage.functaset.functaset import Functaset
from functa.storage.images.source import open_images
from functa.storage.places.address import open_location
from functa.tasks.evaluation.config import EvaluationConfig
from functa.tasks.inputs.pictures import Pictures
from functa.tasks.trained import load_field

Progress = Callable[[str, int, int], None]  # (what, done, total)


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody is told of."""


class EvaluationJob(Config):
    """URIs of everything measured; empty where a stage has not run."""

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
    output: str  # URI of the run's folder
    device: str


@dataclass(frozen=True)
class Bench:
    """What the evaluators share: the field, its functaset and the images, opened."""

    job: EvaluationJob
    device: torch.device
    field: Field
    inner: InnerConfig
    functaset: Functaset
    training: Pictures
    test: Pictures

    @property
    def loop(self) -> InnerLoop:
        """The inner loop at the images' resolution, eager."""
        return InnerLoop(self.field, self.inner, self.training.resolution)

    def decode_raw(self, z: Tensor, batch: int = 256) -> Tensor:
        """Latents [n, s, s, c] -> images [n, H, W, ch] on the CPU, unclamped: so functa defines PSNR."""
        with torch.no_grad():
            return torch.cat([self.field(part.to(self.device), self.test.resolution).cpu() for part in z.split(batch)])

    def decode(self, z: Tensor, batch: int = 256) -> Tensor:
        """Latents [n, s, s, c] -> images [n, H, W, ch] in [0, 1], on the CPU."""
        resolution = self.training.resolution
        return torch.cat([decode(self.field, part.to(self.device), resolution).cpu() for part in z.split(batch)])


def open_bench(job: EvaluationJob) -> Bench:
    """Loads the field, opens functaset and images."""
    device = choose_device(job.device)
    field, inner, _ = load_field(job.field)
    images = open_images(job.images)
    return Bench(
        job=job,
        device=device,
        field=field.to(device),
        inner=inner,
        functaset=Functaset.open(job.functaset),
        training=Pictures(images, "train", job.images),
        test=Pictures(images, "test", job.images),
    )


def write_arrays(output: str, name: str, **arrays: np.ndarray) -> None:
    """Arrays for the report as one .npz in the run's folder."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    open_location(output).write(f"arrays/{name}.npz", buffer.getvalue())


def read_arrays(output: str, name: str) -> dict[str, Any]:
    """What write_arrays wrote; empty where it did not."""
    location = open_location(output)
    if not location.exists(f"arrays/{name}.npz"):
        return {}
    with np.load(io.BytesIO(location.read(f"arrays/{name}.npz")), allow_pickle=False) as archive:
        return dict(archive)


def all_arrays(output: str) -> dict[str, dict[str, np.ndarray]]:
    """Everything that evaluators wrote into the run's folder, by name."""
    names = sorted(key.rpartition("/")[2] for key in open_location(output).list("arrays/"))
    return {name.removesuffix(".npz"): read_arrays(output, name.removesuffix(".npz")) for name in names}
