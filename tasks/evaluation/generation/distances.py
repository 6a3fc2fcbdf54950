"""Generation: how far samples are from the training images, with reconstructions as floor and noise as ceiling.

Frechet and kernel distances, precision and recall, in named feature spaces (features.py). None of them
is comparable to FID, but FID itself: Inception's features from the standard weights' file, of enough images.
"""

import logging
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from functa.models.field.inner import decode
from functa.models.measures.distances import kernel_distance, precision_recall
from functa.models.measures.metrics import frechet_distance
from functa.storage.errors import StorageError
from functa.storage.images.source import open_images
from functa.storage.places.address import open_location
from functa.tasks.evaluation.bench import EvaluationJob, write_arrays
from functa.tasks.evaluation.config import EvaluationConfig
from functa.tasks.evaluation.generation.feature_sets import Gathered, merged
from functa.tasks.evaluation.generation.inception import DIMENSIONS, RESIZE, check_counts, is_fid
from functa.tasks.inference.sample import read_samples
from functa.tasks.inputs.pictures import as_uint8, digest_of, spread
from functa.tasks.trained import load_field

NEIGHBOURS = 4  # rows that precision and recall need: the third nearest of the others

NAMES = {"fd": "samples", "fd_reconstruction": "reconstruction", "fd_noise": "noise"}

Warn = Callable[[str], None]

logger = logging.getLogger(__name__)


def reference_labels(labels: np.ndarray, count: int) -> np.ndarray:
    """Labels of `count` samples in the proportions of the training set."""
    return np.sort(labels)[np.linspace(0, len(labels) - 1, count).round().astype(np.int64)]


def measure(
    job: EvaluationJob,
    slices: Sequence[str],
    labels: Sequence[int] | None,
    features: Sequence[str],
    warn: Warn = logger.warning,
) -> dict[str, Any]:
    """fd, fd_reconstruction, fd_noise, kd, precision and recall by space, with their counts; FID where it may be.

    slices: the samples' files; features: all slices' files of write_features, which stay
    (forget_features). Of a conditional model also label_agreement: the share of samples that the pixel classifier
    takes for their label. `warn` is told what a reader of the figures must know.
    Raises StorageError for slices that are not of one kind, and for samples of which more than half are duplicates.
    """
    sets = merged(features)
    check_sets(sets, job.evaluation, warn)
    _show_samples(job, slices, labels)
    figures = {**distances(sets, warn), **_neighbourhoods(sets, job.evaluation.subset)}
    figures["fd_reference"] |= {"subset": figures.pop("subset")}
    samples = sets["samples"]
    figures["duplicates"] = samples.duplicates
    figures = named(figures, sets, job)
    if labels is not None and "classifier" in samples.spaces:
        figures["label_agreement"] = samples.agreeing / len(labels)
    return figures


def forget_features(output: str) -> None:
    """Removes all slices' features from a run's folder: once its figures are written, not sooner.

    Computed again they cost a pass over all training images.
    """
    location = open_location(output)
    for key in location.list("features/"):
        if key.endswith(".npz"):
            location.delete(key)


def check_sets(sets: dict[str, Gathered], evaluation: EvaluationConfig, warn: Warn) -> None:
    """Raises StorageError where the sets cannot be compared, or the samples are hardly samples."""
    reference, samples = sets["reference"], sets["samples"]
    for name, found in sets.items():
        if found.shape != reference.shape:
            raise StorageError(
                f"{name} of {_sides(found.shape)} cannot be compared with reference images of "
                f"{_sides(reference.shape)}: distances need equal sizes; evaluate into a new --root"
            )
    count, duplicates = sum(len(part) for part in samples.pictures), samples.duplicates
    if duplicates > count / 2 and not evaluation.allow_duplicates:
        raise StorageError(
            f"{duplicates} of {count} samples repeat another one pixel by pixel: distances would measure a few "
            "pictures many times; train the diffusion model longer, or give evaluation.allow_duplicates=true"
        )
    if duplicates:
        warn(f"{duplicates} of {count} samples repeat another one pixel by pixel")
    if evaluation.fid.weights is not None:
        space = next(name for name in reference.spaces if name.startswith("inception"))
        check_counts(evaluation.fid, samples.spaces[space].count, reference.spaces[space].count)


def _sides(shape: Sequence[int]) -> str:
    return "x".join(str(side) for side in shape)


def distances(sets: dict[str, Gathered], warn: Warn) -> dict[str, Any]:
    """Frechet distances of each set by space, where there are moments, and fd_reference: what was compared."""
    figures: dict[str, Any] = {name: {} for name in NAMES}
    reference, samples = sets["reference"], sets["samples"]
    for space, known in reference.spaces.items():
        count = samples.spaces[space].count
        if known.moments is None:
            warn(no_distance(space, count, known.dimensions))
            continue
        if count <= known.dimensions:
            warn(
                f"Frechet distance in space '{space}': {count} samples leave the covariance of {known.dimensions} "
                "features without full rank"
            )
        for name, kind in NAMES.items():
            found = sets[kind].spaces.get(space)
            if found is not None and found.moments is not None:
                figures[name][space] = frechet_distance(found.moments, known.moments)
    first = next(iter(reference.spaces))
    figures["fd_reference"] = {
        "images": "train", "count": reference.spaces[first].count, "samples": samples.spaces[first].count,
        "dimensions": {space: known.dimensions for space, known in reference.spaces.items()},
    }  # fmt: skip
    return figures


def no_distance(space: str, samples: int, dimensions: int) -> str:
    """Why no Frechet distance was taken."""
    if samples <= dimensions:
        return (
            f"no Frechet distance in space '{space}': {samples} samples are not more than its {dimensions} dimensions, "
            "so their covariance would measure their number; give evaluation.samples more"
        )
    return f"no Frechet distance in space '{space}': covariances of {dimensions} dimensions are too large to compare"


def _neighbourhoods(sets: dict[str, Gathered], most: int) -> dict[str, Any]:
    """kd, precision and recall of the samples by space, each on equally many rows of samples and reference: subset."""
    figures: dict[str, Any] = {"kd": {}, "precision": {}, "recall": {}, "subset": {}}
    for space, known in sets["reference"].spaces.items():
        found = sets["samples"].spaces[space]
        most_here = min(most, len(torch.cat(known.kept)), len(torch.cat(found.kept)))
        if most_here < NEIGHBOURS:
            continue
        rows, reference = found.rows(most_here), known.rows(most_here)
        figures["subset"][space] = most_here
        figures["kd"][space] = kernel_distance(rows, reference)
        figures["precision"][space], figures["recall"][space] = precision_recall(rows, reference)
    return figures


def named(figures: dict[str, Any], sets: dict[str, Gathered], job: EvaluationJob) -> dict[str, Any]:
    """The figures, with what may be called FID under that name, and the protocol of whatever Inception gave."""
    fid, reference, samples = job.evaluation.fid, sets["reference"], sets["samples"]
    space = next((name for name in reference.spaces if name.startswith("inception")), None)
    if space is None:
        return figures
    counts = {kind: sets[kind].spaces[space].count for kind in ("samples", "reconstruction", "reference")}
    keys = digest_of(open_images(job.images).split("train").keys)
    protocol = {
        "weights": reference.weights, "resize": RESIZE, "batch": fid.batch, "dimensions": DIMENSIONS, "counts": counts,
        "reference": {"images": "train", "keys": keys}, "seed": job.seed,
        "versions": {name: version(name) for name in ("torch", "torch-fidelity")},
    }  # fmt: skip
    if not is_fid(fid, samples.weights, counts["samples"], counts["reference"]):
        return figures | {"inception_protocol": protocol}
    return figures | {
        "fid": figures["fd"].pop(space),
        "fid_reconstruction": figures["fd_reconstruction"].pop(space),
        "fid_protocol": protocol,
    }


def _show_samples(job: EvaluationJob, slices: Sequence[str], labels: Sequence[int] | None) -> None:
    """Uncurated: spread over the indices, so over the classes, without any choice."""
    count = int(slices[-1].removesuffix(".npy").rpartition("-")[2])
    shown = spread(count, min(count, job.evaluation.shown))
    z = np.concatenate([read_samples(slices, int(row), int(row) + 1) for row in shown])
    write_arrays(
        job.output,
        "samples",
        samples=as_uint8(_decoded(job, torch.from_numpy(z))),
        labels=np.array([-1 if labels is None else labels[row] for row in shown]),
    )


def _decoded(job: EvaluationJob, z: Tensor) -> Tensor:
    field, _, _ = load_field(job.field)
    resolution = open_images(job.images).resolution
    with torch.no_grad():
        return decode(field, z, (resolution, resolution))
