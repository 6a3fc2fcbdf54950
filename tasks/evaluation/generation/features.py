"""Features of what is compared, slice by slice: of samples, reconstructions, noise latents, and of the reference.

The spaces are named. Without any download: penultimate features of the pipeline's own pixel classifier, and normalised
latents. With the standard weights' file: Inception's. The reference is the training images, or their latents.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from functa.models.compute.device import choose_device
from functa.models.compute.randomness import mix, stage_number
from functa.models.config import Config, InnerConfig, NormalizationConfig
from functa.models.field.field import Field
from functa.models.field.inner import InnerLoop, decode
from functa.models.latents.normalize import Normalizer
from functa.models.measures.metrics import FrechetStatistics
from functa.storage.errors import StorageError
from functa.storage.functaset.functaset import Functaset
from functa.storage.images.source import SplitOfKeys, open_keys
from functa.storage.places.address import open_location, read_json, write_json
from functa.tasks.evaluation.evaluator_input import EvaluationJob
from functa.tasks.evaluation.generation.feature_inputs import read_keys, training_rows
from functa.tasks.evaluation.generation.feature_sets import Gathered, Space, to_bytes
from functa.tasks.evaluation.generation.inception import load_inception, space_of, weights_digest
from functa.tasks.inference.sample import read_samples
from functa.tasks.inputs.latents import PlainRows, training_normalizer
from functa.tasks.inputs.pictures import as_float, as_uint8, spread
from functa.tasks.trained import load_field, load_pixel_classifier, logits_of

Kind = Literal["reference", "samples", "reconstruction", "noise"]

KINDS: tuple[Kind, ...] = ("reference", "samples", "reconstruction", "noise")

BATCH = 256

ENCODED = 64  # at a time: the inner loop keeps its steps

MAX_DIMENSIONS = 4096  # of a covariance: its root takes minutes there, and grows with the cube

MAX_STATE_BYTES = 1 << 30  # of JSON: two numbers a latent element

KEPT_NUMBERS = 1 << 27  # of one set's features in memory: of wide ones fewer rows are kept

Progress = Callable[[int, int], None]


class FeatureJob(Config):
    """One slice, number `part` of `parts`, of a set."""

    evaluation: EvaluationJob
    kind: Kind
    part: int
    parts: int
    count: int  # of samples, and so of reconstructions and noise latents
    images: int = 0  # of the reference
    slices: tuple[str, ...] = ()  # URIs of all samples' files
    labels: tuple[int, ...] | None = None  # of this part's samples; None for an unconditional model


@dataclass(frozen=True)
class Batch:
    """Rows [B] of a set of `total`, as pictures [B, H, W, ch] in [0, 1] and as latents [B, s, s, c], or one of them."""

    rows: np.ndarray
    total: int
    images: Tensor | None
    z: Tensor | None


@dataclass(frozen=True)
class Tools:
    """The models and data that features are computed with."""

    device: torch.device
    of_keys: SplitOfKeys
    functaset: Functaset
    field: Field
    inner: InnerConfig
    pixels: Any  # the pixel classifier, or None where there is none
    normalizer: Normalizer
    inception: Callable[[Tensor], Tensor] | None
    weights: str  # sha256 of Inception's file, or empty
    side: int  # of the pictures, in pixels

    @property
    def resolution(self) -> tuple[int, int]:
        """Return height and width of the pictures."""
        return self.side, self.side


def part_of(count: int, part: int, parts: int) -> np.ndarray:
    """Return the row numbers of one of `parts` nearly equal slices of `count` rows."""
    return np.arange(count * part // parts, count * (part + 1) // parts)


def write_features(job: FeatureJob, progress: Progress = lambda done, total: None) -> str:
    """Compute one slice's features, write what is needed of them as one .npz file, and return its URI.

    An existing file is kept. Raises StorageError for samples of another shape than the functaset's latents.
    """
    output = f"{job.evaluation.output}/features"
    location, key = open_location(output), f"{job.kind}-{job.part:04d}-{job.parts:04d}.npz"
    if not location.exists(key):
        location.write(key, to_bytes(gather(job, open_tools(job), progress)))
    return f"{output}/{key}"


def open_tools(job: FeatureJob) -> Tools:
    """Open what this slice needs; no Inception for noise latents: the literature has no such figure."""
    wanted = job.evaluation.evaluation.fid.weights is not None and job.kind != "noise"
    return _tools(job.evaluation.model_dump_json(), wanted)


@lru_cache(maxsize=2)  # with Inception and without
def _tools(evaluation: str, with_inception: bool) -> Tools:
    """Open an evaluation's models and data once for all slices that this process computes."""
    job = EvaluationJob.model_validate_json(evaluation)
    device, fid = choose_device(job.device), job.evaluation.fid
    functaset = training_rows(job.output, job.functaset).functaset
    field, inner, metadata = load_field(job.field)
    side = metadata["resolution"]
    return Tools(
        device=device,
        of_keys=open_keys(job.images, (side, side, field.image_channels)),
        functaset=functaset,
        field=field.to(device),
        inner=inner,
        pixels=load_pixel_classifier(job.pixel_classifier).to(device) if job.pixel_classifier else None,
        normalizer=_latent_normalizer(job, functaset),
        inception=load_inception(fid, device) if with_inception else None,
        weights=weights_digest(fid) if with_inception else "",
        side=side,
    )


def gather(job: FeatureJob, tools: Tools, progress: Progress = lambda done, total: None) -> Gathered:
    """Compute everything that is kept of one slice."""
    gathered = Gathered(job.kind, weights=tools.weights)
    for batch in _SETS[job.kind](job, tools):
        for name, features in _features(tools, batch).items():
            space = gathered.spaces.setdefault(name, _space(job, name, features.shape[1]))
            space.add(features, np.isin(batch.rows, _kept(job, features.shape[1], batch.total)))
        if batch.images is not None:
            gathered.shape = tuple(batch.images.shape[1:])
        first = batch.total * job.part // job.parts
        if job.kind == "samples" and batch.images is not None:
            gathered.pictures.append(_digests(as_uint8(batch.images)))
            gathered.agreeing += _agreeing(job, tools, batch.images, batch.rows - first)
        if len(batch.rows):
            progress(int(batch.rows[-1]) + 1 - first, batch.total * (job.part + 1) // job.parts - first)
    return gathered


def has_moments(space: str, count: int, dimensions: int) -> bool:
    """Return whether a Frechet distance is computed: a covariance of too few samples mostly measures their number.

    Inception's always is: with too few samples, only since the config allowed it.
    """
    return space.startswith("inception") or (dimensions < count and dimensions <= MAX_DIMENSIONS)


def _space(job: FeatureJob, name: str, dimensions: int) -> Space:
    return Space(dimensions, FrechetStatistics() if has_moments(name, job.count, dimensions) else None)


def _kept(job: FeatureJob, dimensions: int, total: int) -> np.ndarray:
    """Return the rows of the whole set whose features are kept: the same for any number of slices."""
    return spread(total, min(total, job.evaluation.evaluation.subset, max(4, KEPT_NUMBERS // dimensions)))


def _features(tools: Tools, batch: Batch) -> dict[str, Tensor]:
    """Return the features of a batch by space, [B, D] each."""
    found: dict[str, Tensor] = {}
    if batch.images is not None:
        if tools.pixels is not None:
            with torch.no_grad():
                found["classifier"] = tools.pixels.features(batch.images.to(tools.device)).cpu()
        if tools.inception is not None:
            found[space_of(tools.weights)] = tools.inception(batch.images)
    if batch.z is not None:
        found["latent"] = tools.normalizer.normalize(batch.z).flatten(1)
    return found


def _latent_normalizer(job: EvaluationJob, functaset: Functaset) -> Normalizer:
    """Normalise by the training images' latents, per element; kept in the run, as finding it may read all latents."""
    location, key = open_location(job.output), "features/normalizer.json"
    if location.exists(key):
        return Normalizer.from_state(read_json(location, key, limit=MAX_STATE_BYTES))
    normalizer = training_normalizer(functaset, NormalizationConfig(kind="array"), plain=True)
    write_json(location, key, normalizer.state(), limit=MAX_STATE_BYTES)
    return normalizer


def _batches(job: FeatureJob, total: int) -> Iterator[np.ndarray]:
    rows = part_of(total, job.part, job.parts)
    for start in range(0, len(rows), BATCH):
        yield rows[start : start + BATCH]


def _reference(job: FeatureJob, tools: Tools) -> Iterator[Batch]:
    """Yield readable training images, then the latents of training images; neither is reconstructed."""
    keys, latents = read_keys(job.evaluation.output, job.part, job.parts), _training_rows(job)
    for rows in _batches(job, job.images):
        first = job.images * job.part // job.parts
        read = tools.of_keys(keys[rows[0] - first : rows[-1] + 1 - first]).read(range(len(rows)))
        yield Batch(rows[read.good], job.images, as_float(read.images[read.good], tools.device), None)
    for rows in _batches(job, len(latents)):
        yield Batch(rows, len(latents), None, latents.read(rows))


def _training_rows(job: FeatureJob) -> PlainRows:
    return training_rows(job.evaluation.output, job.evaluation.functaset).open()


def _samples(job: FeatureJob, tools: Tools) -> Iterator[Batch]:
    for rows in _batches(job, job.count):
        z = read_samples(job.slices, int(rows[0]), int(rows[-1]) + 1)
        if z.shape[1:] != tools.functaset.latent_shape or len(z) != len(rows):
            raise StorageError(
                f"{job.evaluation.output}/samples: {len(z)} latents of shape {z.shape[1:]} where {len(rows)} of "
                f"{tools.functaset.latent_shape}, the functaset's, are due; delete that folder and evaluate again"
            )
        yield _decoded(tools, rows, job.count, torch.from_numpy(z))


def _reconstruction(job: FeatureJob, tools: Tools) -> Iterator[Batch]:
    """Yield reconstructed training images. Like any image, a reconstruction has its own encoding as latent."""
    latents = _training_rows(job)
    chosen = spread(len(latents), min(job.count, len(latents)))
    loop = InnerLoop(tools.field, tools.inner, tools.resolution)
    for rows in _batches(job, len(chosen)):
        images = _decoded(tools, rows, len(chosen), latents.read(chosen[rows])).images
        assert images is not None
        z = torch.cat([loop.encode(part.to(tools.device)).cpu() for part in images.split(ENCODED)])
        yield Batch(rows, len(chosen), images, z)


def _noise(job: FeatureJob, tools: Tools) -> Iterator[Batch]:
    """Yield Gaussian latents with the training set's mean and sd per element: a model that learned nothing else.

    The same moments as the data make this ceiling lower, so harder to beat, than the sampler's starting noise.
    """
    seed, shape = mix(job.evaluation.seed, stage_number("noise")), tools.functaset.latent_shape
    for rows in _batches(job, job.count):
        drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(mix(seed, int(row)))) for row in rows]
        yield _decoded(tools, rows, job.count, tools.normalizer.denormalize(torch.stack(drawn)))


_SETS: dict[Kind, Callable[[FeatureJob, Tools], Iterator[Batch]]] = {
    "reference": _reference, "samples": _samples, "reconstruction": _reconstruction, "noise": _noise,
}  # fmt: skip


def _decoded(tools: Tools, rows: np.ndarray, total: int, z: Tensor) -> Batch:
    with torch.no_grad():
        return Batch(rows, total, decode(tools.field, z.to(tools.device), tools.resolution).cpu(), z)


def _digests(pictures: np.ndarray) -> np.ndarray:
    """Return the sha256 of each picture's bytes: uint8 [n, 32]."""
    return np.stack([np.frombuffer(hashlib.sha256(picture.tobytes()).digest(), np.uint8) for picture in pictures])


def _agreeing(job: FeatureJob, tools: Tools, images: Tensor, rows: np.ndarray) -> int:
    """Count the samples, at these rows of the slice, that the pixel classifier takes for their label."""
    if job.labels is None or tools.pixels is None:
        return 0
    guesses = logits_of(tools.pixels, images, BATCH).argmax(1).cpu().numpy()
    return int((guesses == np.array(job.labels)[rows]).sum())
