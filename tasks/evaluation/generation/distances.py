"""Generation: how far samples are from the training images, between floors and a ceiling.

Frechet and kernel distances, precision, recall and label agreement, in named feature spaces (spaces.py). Floors are
reconstructions and test images, the ceiling is decoded noise. Only FID itself is comparable to FID: Inception's
features from the standard weights' file, of enough images.
"""

from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from functa.models.measures.distances import kernel_distance, precision_recall
from functa.models.measures.metrics import frechet_distance
from functa.models.measures.probe import LinearProbe
from functa.storage.errors import StorageError
from functa.storage.images.source import open_images
from functa.storage.places.address import open_location
from functa.tasks.evaluation.config import EvaluationConfig
from functa.tasks.evaluation.evaluator_input import SILENT, EvaluationJob, Messages
from functa.tasks.evaluation.generation.feature_inputs import is_input
from functa.tasks.evaluation.generation.feature_sets import Gathered, merged
from functa.tasks.evaluation.generation.inception import DIMENSIONS, RESIZE, check_counts, is_fid
from functa.tasks.inputs.pictures import digest_of

NEIGHBOURS = 4  # rows that precision and recall need: the third nearest of the others

NAMES = {"fd": "samples", "fd_reconstruction": "reconstruction", "fd_test": "test", "fd_noise": "noise"}

Warn = Callable[[str], None]


def reference_labels(labels: np.ndarray, count: int) -> np.ndarray:
    """Return labels of `count` samples in the proportions of the training set."""
    return np.sort(labels)[np.linspace(0, len(labels) - 1, count).round().astype(np.int64)]


def measure(job: EvaluationJob, messages: Messages = SILENT) -> dict[str, Any]:
    """Measure fd, its floors and ceiling, kd, precision and recall by space, with their counts; FID if allowed.

    Of a conditional model also label_agreement: the share of samples that a linear probe of the training images takes
    for their label, and probe_top1, its accuracy on test images. The files of features are kept (delete_features).
    Raises StorageError for slices that are not of one kind, and for samples of which more than half are duplicates.
    """
    drawn = job.samples
    assert drawn is not None
    sets = merged(drawn.features)
    check_sets(sets, job.evaluation, messages.warn)
    figures = {**distances(sets, messages.warn), **_neighbourhoods(sets, job.evaluation.subset)}
    figures["fd_reference"] |= {"subset": figures.pop("subset")}
    figures["duplicates"] = sets["samples"].duplicates
    if drawn.labels is not None:
        figures |= _agreement(sets)
    figures["fd_protocol"] = {
        space: known.protocol for space, known in sets["reference"].spaces.items()
        if known.protocol and not _is_inception(space)
    }  # fmt: skip
    return named(figures, sets, job)


def delete_features(output: str) -> None:
    """Delete all slices' features from a run's folder: once its figures are written, not sooner.

    Computed again they cost a pass over all training images.
    """
    location = open_location(output)
    for key in location.list("features/"):
        if key.endswith(".npz") or is_input(key):
            location.delete(key)


def check_sets(sets: dict[str, Gathered], evaluation: EvaluationConfig, warn: Warn) -> None:
    """Raise StorageError if the sets cannot be compared, or if most samples are duplicates."""
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
        space = next(name for name in reference.spaces if _is_inception(name))
        check_counts(evaluation.fid, samples.spaces[space].count, reference.spaces[space].count)


def _is_inception(space: str) -> bool:
    return space.startswith("inception")


def _sides(shape: Sequence[int]) -> str:
    return "x".join(str(side) for side in shape)


def distances(sets: dict[str, Gathered], warn: Warn) -> dict[str, Any]:
    """Measure Frechet distances of each set by space, where there are moments; fd_reference: what was compared."""
    figures: dict[str, Any] = {name: {} for name in NAMES}
    reference, samples = sets["reference"], sets["samples"]
    for space, known in reference.spaces.items():
        count = samples.spaces[space].count
        if known.moments is None:
            warn(no_distance(space, count, known.dimensions, known.count))
            continue
        if count <= known.dimensions:
            warn(
                f"Frechet distance in space '{space}': {count} samples leave the covariance of {known.dimensions} "
                "features without full rank"
            )
        for name, kind in NAMES.items():
            found = sets[kind].spaces.get(space) if kind in sets else None
            # Of test images there may be fewer than of samples.
            if (
                found is not None
                and found.moments is not None
                and not (kind == "test" and found.count <= known.dimensions)
            ):
                figures[name][space] = frechet_distance(found.moments, known.moments)
    first = next(iter(reference.spaces))
    figures["fd_reference"] = {
        "images": "train", "count": reference.spaces[first].count, "samples": samples.spaces[first].count,
        "dimensions": {space: known.dimensions for space, known in reference.spaces.items()},
        "test": max((space.count for space in sets["test"].spaces.values()), default=0) if "test" in sets else 0,
    }  # fmt: skip
    return figures


def no_distance(space: str, samples: int, dimensions: int, images: int) -> str:
    """Explain why no Frechet distance was measured. `images` is the number of training images, the most samples."""
    if samples <= dimensions:
        needed = f"no Frechet distance in space '{space}': it has {dimensions:,} dimensions, and needs more "
        if images <= dimensions:
            return f"{needed}training images and samples than that; there are {images:,} and {samples:,}"
        return (
            f"{needed}samples than that; there are {samples:,}: set evaluation.samples above {dimensions}, up to the "
            f"{images} training images"
        )
    return f"no Frechet distance in space '{space}': covariances of {dimensions} dimensions are too large to compare"


def _neighbourhoods(sets: dict[str, Gathered], most: int) -> dict[str, Any]:
    """Measure kd, precision and recall by space, each on equally many rows of samples and reference: subset."""
    figures: dict[str, Any] = {"kd": {}, "precision": {}, "recall": {}, "subset": {}}
    for space, known in sets["reference"].spaces.items():
        found = sets["samples"].spaces[space]
        most_here = min(most, known.kept_rows, found.kept_rows)
        if most_here < NEIGHBOURS:
            continue
        (rows, _), (reference, _) = found.rows(most_here), known.rows(most_here)
        figures["subset"][space] = most_here
        figures["kd"][space] = kernel_distance(rows, reference)
        figures["precision"][space], figures["recall"][space] = precision_recall(rows, reference)
    return figures


def _agreement(sets: dict[str, Gathered]) -> dict[str, Any]:
    """Measure label_agreement and probe_top1 by space, of the rows that are kept; nothing of a single class."""
    figures: dict[str, Any] = {"label_agreement": {}, "probe_top1": {}}
    for space, known in sets["reference"].spaces.items():
        features, labels = known.rows(known.kept_rows)
        if len(np.unique(labels)) < 2:
            continue
        probe = LinearProbe(features, labels)
        for name, kind in (("label_agreement", "samples"), ("probe_top1", "test")):
            found = sets[kind].spaces.get(space) if kind in sets else None
            if found is not None and found.kept_rows:
                figures[name][space] = probe.agreement(*found.rows(found.kept_rows))
    return figures if figures["label_agreement"] else {}


def named(figures: dict[str, Any], sets: dict[str, Gathered], job: EvaluationJob) -> dict[str, Any]:
    """Return the figures, with what may be called FID under that name, and the protocol of Inception's figures."""
    fid, reference = job.evaluation.fid, sets["reference"]
    space = next((name for name in reference.spaces if _is_inception(name)), None)
    if space is None:
        return figures
    counts = {kind: sets[kind].spaces[space].count for kind in ("samples", "reconstruction", "reference")}
    keys = digest_of(open_images(job.images).split("train").keys)
    protocol = {
        **reference.spaces[space].protocol, "resize": RESIZE, "batch": fid.batch, "dimensions": DIMENSIONS,
        "counts": counts, "reference": {"images": "train", "keys": keys}, "seed": job.seed,
        "versions": {name: version(name) for name in ("torch", "torch-fidelity")},
    }  # fmt: skip
    if not is_fid(fid, protocol["weights"], counts["samples"], counts["reference"]):
        return figures | {"inception_protocol": protocol}
    return figures | {
        "fid": figures["fd"].pop(space),
        "fid_reconstruction": figures["fd_reconstruction"].pop(space),
        "fid_protocol": protocol,
    }
