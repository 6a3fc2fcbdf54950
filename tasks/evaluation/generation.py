"""Generation: Frechet distances of samples, with reconstructions as the floor and noise latents as the ceiling.

The spaces are named and need no download: penultimate features of the pipeline's own pixel classifier, and
normalised latents. Neither is comparable to FID. The reference is the training images (or their latents).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.config import NormalizationConfig
from models.metrics import FrechetStatistics, accuracy, frechet_distance
from tasks.evaluation.job import Bench, EvaluationJob, as_uint8, open_bench, write_arrays
from tasks.sample import read_slices
from tasks.training.classifier import logits_of
from tasks.training.latents import Split, load_split, training_normalizer
from tasks.training.pictures import spread
from tasks.training.pixel_classifier import load_pixel_classifier
from tasks.training.seeds import mix, stage_number


def reference_labels(labels: np.ndarray, count: int) -> np.ndarray:
    """Labels of `count` samples in the proportions of the training set."""
    return np.sort(labels)[np.linspace(0, len(labels) - 1, count).round().astype(np.int64)]


def measure(job: EvaluationJob, slices: list[str], labels: list[int] | None) -> dict[str, Any]:
    """fd, fd_reconstruction and fd_noise in the spaces `classifier` and `latent`, with their counts.

    Of a conditional model also label_agreement: the share of samples that the pixel classifier takes for their label.
    """
    bench = open_bench(job)
    training = load_split(bench.functaset, "train")
    rows = torch.from_numpy(spread(len(training.z), len(read_slices(slices))))
    sets = {
        "fd": torch.from_numpy(read_slices(slices)),
        "fd_reconstruction": training.z[rows],
        "fd_noise": noise_latents(bench, training, len(rows)),
    }
    images = {name: bench.decode(z) for name, z in sets.items()}
    _show_samples(bench, images["fd"], labels)
    figures: dict[str, Any] = {name: {} for name in sets}
    dimensions = {}
    for space, features in _spaces(bench, training).items():
        reference = features["reference"]()
        dimensions[space] = reference.dimensions
        if len(rows) <= reference.dimensions:
            continue  # a covariance of fewer samples than dimensions measures their number, not their quality
        for name in sets:
            figures[name][space] = frechet_distance(features["of"](sets[name], images[name], name), reference)
    figures["fd_reference"] = {
        "images": "train", "count": len(bench.training), "samples": len(rows), "dimensions": dimensions,
    }  # fmt: skip
    if labels is not None:
        model = load_pixel_classifier(bench.job.pixel_classifier).to(bench.device)
        figures["label_agreement"] = accuracy(logits_of(model, images["fd"], 256).cpu(), torch.tensor(labels))
    return figures


def noise_latents(bench: Bench, training: Split, count: int) -> Tensor:
    """Gaussian latents with the training set's mean and sd per element: what a model that learned nothing else gives.

    The same moments as the data make this ceiling lower, so harder to beat, than the sampler's starting noise.
    """
    normalizer = training_normalizer(bench.functaset, NormalizationConfig(kind="array"), plain=True)
    generator = torch.Generator().manual_seed(mix(bench.job.seed, stage_number("noise")))
    return normalizer.denormalize(torch.randn(count, *training.z.shape[1:], generator=generator))


def _spaces(bench: Bench, training: Split) -> dict[str, dict[str, Callable[..., FrechetStatistics]]]:
    model = load_pixel_classifier(bench.job.pixel_classifier).to(bench.device)
    normalizer = training_normalizer(bench.functaset, NormalizationConfig(kind="array"), plain=True)

    def of_images(_: Tensor, images: Tensor, __: str) -> FrechetStatistics:
        return _image_statistics(model, images, bench.device)

    def of_latents(z: Tensor, images: Tensor, name: str) -> FrechetStatistics:
        if name == "fd_reconstruction":  # a reconstruction is an image: its latent is its encoding
            z = torch.cat([bench.loop.encode(part.to(bench.device)).cpu() for part in images.split(64)])
        return _latent_statistics(normalizer.normalize(z))

    return {
        "classifier": {
            "of": of_images,
            "reference": lambda: _image_statistics(model, bench.training, bench.device),
        },
        "latent": {"of": of_latents, "reference": lambda: _latent_statistics(normalizer.normalize(training.z))},
    }


def _image_statistics(model: nn.Module, images: Any, device: torch.device, batch: int = 256) -> FrechetStatistics:
    """Of a tensor of images or of Pictures, batch by batch."""
    statistics = FrechetStatistics()
    for start in range(0, len(images), batch):
        rows = np.arange(start, min(start + batch, len(images)))
        part = images[rows] if isinstance(images, Tensor) else images.batch(rows)
        with torch.no_grad():
            statistics.update(model.features(part.to(device)).cpu())
    return statistics


def _latent_statistics(z: Tensor) -> FrechetStatistics:
    statistics = FrechetStatistics()
    statistics.update(z.flatten(1))
    return statistics


def _show_samples(bench: Bench, images: Tensor, labels: list[int] | None) -> None:
    """Uncurated: spread over the indices, so over the classes, without any choice."""
    shown = spread(len(images), bench.job.evaluation.shown)
    chosen = np.array([-1 if labels is None else labels[i] for i in shown])
    write_arrays(bench.job.output, "samples", samples=as_uint8(images[shown]), labels=chosen)
