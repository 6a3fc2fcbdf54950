"""Features of what is compared, slice by slice: samples, reconstructions, noise latents, test images, the reference.

The spaces are those of spaces.py; Inception's too with the standard weights' file. The reference is the training
images, or their latents.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

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
from functa.storage.images.source import Images, SplitOfKeys, open_keys
from functa.storage.places.address import open_location, read_json, write_json
from functa.tasks.evaluation.evaluator_input import EvaluationJob
from functa.tasks.evaluation.generation.extractor import Extractor, Setting
from functa.tasks.evaluation.generation.feature_inputs import plain_latents, read_listed
from functa.tasks.evaluation.generation.feature_sets import Gathered, Space, to_bytes
from functa.tasks.evaluation.generation.inception import space_of, weights_digest
from functa.tasks.evaluation.generation.spaces import SPACES
from functa.tasks.inference.sample import read_samples
from functa.tasks.inputs.latents import training_normalizer
from functa.tasks.inputs.pictures import as_float, as_uint8, spread
from functa.tasks.trained import load_field

Kind = Literal["reference", "samples", "reconstruction", "noise", "test"]

KINDS: tuple[Kind, ...] = ("reference", "samples", "reconstruction", "noise", "test")

COMPARED_BY_ROW = ("reference", "samples", "test")  # their rows are kept; of the others moments are enough

OF_FID = ("reference", "samples", "reconstruction")  # the literature has no FID of noise or of test images

BATCH = 256

ENCODED = 64  # at a time: the inner loop keeps its steps

MAX_DIMENSIONS = 4096  # of a covariance: its root takes minutes there, and grows with the cube

MAX_COVARIANCES = 1 << 26  # numbers of all covariances of a space: 512 MB

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
    images: int = 0  # of a set of real images: reference, test
    slices: tuple[str, ...] = ()  # URIs of all samples' files
    labels: tuple[int, ...] | None = None  # of this part's samples; None for an unconditional model


@dataclass(frozen=True)
class Batch:
    """Rows [B] of a set of `total`, as pictures [B, H, W, ch] in [0, 1] and as latents [B, s, s, c], or one of them.

    Their labels are int64 [B], or None where they have none.
    """

    rows: np.ndarray
    total: int
    images: Tensor | None
    z: Tensor | None
    labels: np.ndarray | None = None


@dataclass(frozen=True)
class Tools:
    """The models and data that features are computed with."""

    device: torch.device
    of_keys: SplitOfKeys
    functaset: Functaset
    field: Field
    inner: InnerConfig
    normalizer: Normalizer
    extractors: Mapping[str, Extractor]  # by space
    side: int  # of the pictures, in pixels

    @property
    def resolution(self) -> tuple[int, int]:
        """Return height and width of the pictures."""
        return self.side, self.side


def set_sizes(images: Images, samples: int) -> dict[Kind, int]:
    """Return the size of each set beside so many samples: all training images, and at most as many of the others."""
    sizes: dict[Kind, int] = dict.fromkeys(KINDS, samples)
    return sizes | {"reference": len(images.split("train")), "test": min(samples, len(images.split("test")))}


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
    """Open what this slice needs."""
    with_inception = job.evaluation.evaluation.fid.weights is not None and job.kind in OF_FID
    return _tools(job.evaluation.model_dump_json(), with_inception)


@lru_cache(maxsize=2)  # with Inception and without
def _tools(evaluation: str, with_inception: bool) -> Tools:
    """Open an evaluation's models and data once for all slices that this process computes."""
    job = EvaluationJob.model_validate_json(evaluation)
    device = choose_device(job.device)
    functaset = plain_latents(job.output, job.functaset).functaset
    field, inner, metadata = load_field(job.field)
    side, normalizer = metadata["resolution"], _latent_normalizer(job, functaset)
    setting = Setting(job, device, (side, side, field.image_channels), normalizer)
    spaces = [*job.spaces, *([space_of(weights_digest(job.evaluation.fid))] if with_inception else [])]
    return Tools(
        device=device,
        of_keys=open_keys(job.images, setting.shape),
        functaset=functaset,
        field=field.to(device),
        inner=inner,
        normalizer=normalizer,
        extractors={name: SPACES[name].open(setting) for name in spaces},
        side=side,
    )


def gather(job: FeatureJob, tools: Tools, progress: Progress = lambda done, total: None) -> Gathered:
    """Compute everything that is kept of one slice."""
    gathered = Gathered(job.kind)
    for batch in _SETS[job.kind](job, tools):
        for name, extractor in tools.extractors.items():
            _add(job, gathered, name, extractor, batch)
        if batch.images is not None:
            gathered.shape = tuple(batch.images.shape[1:])
        if job.kind == "samples" and batch.images is not None:
            gathered.pictures.append(_digests(as_uint8(batch.images)))
        first = batch.total * job.part // job.parts
        if len(batch.rows):
            progress(int(batch.rows[-1]) + 1 - first, batch.total * (job.part + 1) // job.parts - first)
    return gathered


def _add(job: FeatureJob, gathered: Gathered, name: str, extractor: Extractor, batch: Batch) -> None:
    """Add a batch's features in one space; where there are no moments, only those of the rows that are kept."""
    x = batch.z if extractor.of_latents else batch.images
    wanted = has_moments(name, job.count, extractor.dimensions, extractor.groups)
    if x is None or not (wanted or job.kind in COMPARED_BY_ROW):
        return
    moments = FrechetStatistics() if wanted else None
    space = gathered.spaces.setdefault(
        name, Space(extractor.dimensions, moments, protocol=dict(extractor.protocol))
    )  # fmt: skip
    keep = np.isin(batch.rows, _kept(job, extractor, batch.total))
    needed = np.ones_like(keep) if wanted else keep
    labels = np.full(len(keep), -1) if batch.labels is None else batch.labels
    if needed.any():
        features = extractor.compute(x[torch.from_numpy(needed)])
        space.add(len(keep), features, keep[needed], labels[needed])
    else:
        space.count += len(keep)


def has_moments(space: str, count: int, dimensions: int, groups: int = 1) -> bool:
    """Return whether a Frechet distance is computed: a covariance of too few samples mostly measures their number.

    Inception's always is: with too few samples, only since the config allowed it.
    """
    small = dimensions <= MAX_DIMENSIONS and groups * dimensions**2 <= MAX_COVARIANCES
    return space.startswith("inception") or (dimensions < count and small)


def _kept(job: FeatureJob, extractor: Extractor, total: int) -> np.ndarray:
    """Return the rows of the whole set whose features are kept: the same for any number of slices."""
    if job.kind not in COMPARED_BY_ROW:
        return np.empty(0, np.int64)
    most = max(4, KEPT_NUMBERS // (extractor.groups * extractor.dimensions))
    return spread(total, min(total, job.evaluation.evaluation.subset, most))


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


def _real_images(job: FeatureJob, tools: Tools) -> Iterator[Batch]:
    """Yield readable images, then the latents of images of the same split; neither is reconstructed."""
    listed = read_listed(job.evaluation.output, job.kind, job.part, job.parts)
    first = job.images * job.part // job.parts
    for rows in _batches(job, job.images):
        within = slice(int(rows[0]) - first, int(rows[-1]) + 1 - first)
        read = tools.of_keys(listed.keys[within]).read(range(len(rows)))
        labels = np.array(listed.labels[within])[read.good]
        yield Batch(rows[read.good], job.images, as_float(read.images[read.good], tools.device), None, labels)
    if "latent" in tools.extractors:
        latents = plain_latents(job.evaluation.output, job.evaluation.functaset).open(job.kind)
        chosen = spread(len(latents), min(job.images, len(latents)))
        for rows in _batches(job, len(chosen)):
            split = latents.split(chosen[rows])
            yield Batch(rows, len(chosen), None, split.z, split.labels.numpy())


def _samples(job: FeatureJob, tools: Tools) -> Iterator[Batch]:
    for rows in _batches(job, job.count):
        z = read_samples(job.slices, int(rows[0]), int(rows[-1]) + 1)
        if z.shape[1:] != tools.functaset.latent_shape or len(z) != len(rows):
            raise StorageError(
                f"{job.evaluation.output}/samples: {len(z)} latents of shape {z.shape[1:]} where {len(rows)} of "
                f"{tools.functaset.latent_shape}, the functaset's, are due; delete that folder and evaluate again"
            )
        labels = None if job.labels is None else np.array(job.labels)[rows - job.count * job.part // job.parts]
        yield replace(_decoded(tools, rows, job.count, torch.from_numpy(z)), labels=labels)


def _reconstruction(job: FeatureJob, tools: Tools) -> Iterator[Batch]:
    """Yield reconstructed training images. Like any image, a reconstruction has its own encoding as latent."""
    latents = plain_latents(job.evaluation.output, job.evaluation.functaset).open("reference")
    latent = tools.extractors.get("latent")
    encoded = latent is not None and has_moments("latent", job.count, latent.dimensions)
    chosen = spread(len(latents), min(job.count, len(latents)))
    loop = InnerLoop(tools.field, tools.inner, tools.resolution)
    for rows in _batches(job, len(chosen)):
        images = _decoded(tools, rows, len(chosen), latents.read(chosen[rows])).images
        assert images is not None
        parts = images.split(ENCODED) if encoded else ()
        z = torch.cat([loop.encode(part.to(tools.device)).cpu() for part in parts]) if parts else None
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
    "reference": _real_images, "samples": _samples, "reconstruction": _reconstruction, "noise": _noise,
    "test": _real_images,
}  # fmt: skip


def _decoded(tools: Tools, rows: np.ndarray, total: int, z: Tensor) -> Batch:
    with torch.no_grad():
        return Batch(rows, total, decode(tools.field, z.to(tools.device), tools.resolution).cpu(), z)


def _digests(pictures: np.ndarray) -> np.ndarray:
    """Return the sha256 of each picture's bytes: uint8 [n, 32]."""
    return np.stack([np.frombuffer(hashlib.sha256(picture.tobytes()).digest(), np.uint8) for picture in pictures])
