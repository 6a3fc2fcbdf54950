"""Batches of latents for training: which rows a step uses, and these rows on the device."""

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from functa.models.compute.batch_order import batch_rows
from functa.models.compute.randomness import mix, stage_number
from functa.models.latents.normalize import Affine, Normalizer
from functa.storage.errors import StorageError
from functa.storage.functaset.functaset import Functaset
from functa.storage.readers.memory import Resident
from functa.storage.readers.open import MEMORY_SHARE
from functa.storage.readers.order import Order
from functa.storage.readers.reader import Batch, Indexed, Reader
from functa.storage.readers.streamed import Streamed
from functa.tasks.inputs.prefetch import Prefetcher
from functa.tasks.inputs.reading import STREAMED, Ranks, training_reader

logger = logging.getLogger(__name__)

Choose = Callable[[int], np.ndarray]  # the rows of a step, for the whole global batch


UPLOADED_STEPS = 128  # whose row numbers are copied to a GPU at once


class Batches(Protocol):
    """Maps a step to this rank's part of its batch: x float32 [b, s, s, c], normalised, and labels int64 [b]."""

    def __call__(self, step: int) -> tuple[Tensor, Tensor]: ...


def training_batches(
    functaset: Functaset,
    normalizer: Normalizer,
    batch: int,
    seed: int,
    *,
    ranks: Ranks,
    steps: int,
    classes: int | None,
    plain: bool = False,
    begun: Mapping[str, Any] | None = None,
    hydrates: bool = False,
) -> Batches:
    """Return batches of the training split, in epochs; plain: without augmentations, else one version of each image.

    The split is kept on the device if it fits (codes as bytes), else in this machine's memory or mapped files, from
    which batches are prefetched, and where that is impossible it is streamed shard by shard. Seed and step alone decide
    which rows a step uses; of a split that is streamed, the number of ranks too. `begun` is the metadata of the
    checkpoint that the training continues from: what was streamed then is streamed now, and the other way round.
    `hydrates`: what would be streamed is copied to the machine's disk first, and mapped. Raises StorageError where
    that is impossible, and for a label that is none of the classes.
    """
    images_alone = "augmentation.count" not in functaset.fingerprint or plain
    part, device = ranks.part(batch), ranks.device
    reader = training_reader(functaset, ranks, plain, begun, hydrates)
    if isinstance(reader, Streamed):
        return FromStream(reader, normalizer, batch, seed, ranks, steps, classes, one_each=not images_alone)
    assert isinstance(reader, Indexed)
    if classes is not None:
        check_labels(reader.name, reader.labels, classes)
    choose = _choice(reader, batch, seed, images_alone)
    fits = device.type == "cpu" or _bytes(reader) <= MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]
    if isinstance(reader, Resident) and fits:
        return OnDevice(reader, normalizer, choose, part, device)
    return FromHost(reader, normalizer, choose, part, device, steps)


def order_record(batches: Batches, ranks: Ranks) -> dict[str, int]:
    """Return what a checkpoint records of the order of images: the number of ranks where they are streamed."""
    return {STREAMED: ranks.world} if isinstance(batches, FromStream) else {}


def check_labels(name: str, labels: np.ndarray, classes: int) -> None:
    """Raise StorageError if a label is not below the number of classes. On a GPU the loss would only abort."""
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        bad = int(labels.min() if labels.min() < 0 else labels.max())
        raise StorageError(
            f"{name}: has a row of label {bad}, but there are {classes} classes (0 to {classes - 1}): encode the "
            f"images again with their labels"
        )


def _tensors(batch: Batch, device: torch.device) -> list[Tensor]:
    """Return z, labels int64 and, where there are several quantisers, their numbers; pinned for a GPU."""
    made = [torch.from_numpy(batch.z), torch.from_numpy(batch.labels.astype(np.int64))]
    if batch.which is not None:
        made.append(torch.from_numpy(batch.which))
    return [tensor.pin_memory() for tensor in made] if device.type == "cuda" else made


def _bytes(reader: Indexed) -> int:
    return len(reader) * int(np.prod(reader.latent_shape)) * reader.dtype.itemsize


def _choice(reader: Indexed, batch: int, seed: int, images_alone: bool) -> Choose:
    """Use every row once per epoch, or every image once per epoch in one of its rows, drawn again each time."""
    count = len(reader)  # not the reader itself: on a GPU its copy in memory can be freed
    if images_alone:
        return lambda step: batch_rows(count, batch, seed, step)
    order, starts, counts = rows_by_image(reader)
    stream = mix(seed, stage_number("augmentation"))

    def choose(step: int) -> np.ndarray:
        images = batch_rows(len(counts), batch, seed, step)
        drawn = np.random.Generator(np.random.PCG64(mix(stream, step))).random(batch)
        return order[starts[images] + (drawn * counts[images]).astype(np.int64)]

    return choose


def rows_by_image(reader: Indexed) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return rows ordered by image, int64 [n], and each image's first position in that order and count, [images].

    Images are in the order of their first rows.
    """
    keys = np.ascontiguousarray(reader.ids).view("V16").reshape(-1)
    _, first, image = np.unique(keys, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    image = rank[image]
    order = np.argsort(image, kind="stable")
    counts = np.bincount(image, minlength=len(first))
    return order, np.cumsum(counts) - counts, counts


class OnDevice:
    """Keeps the whole split on the device; row numbers of many steps are copied to a GPU at once, without waiting."""

    def __init__(
        self, reader: Resident, normalizer: Normalizer, choose: Choose, part: slice, device: torch.device
    ) -> None:
        self._affine, self._which = None, None
        if reader.quantizers:
            self._affine = normalizer.fused(*reader.affine).to(device)
            self._which = None if reader.which is None else torch.from_numpy(reader.which.astype(np.int64)).to(device)
        self._normalizer = normalizer.to(device)
        self._stored = torch.from_numpy(reader.z).to(device)  # as stored: a normalised copy would need the memory twice
        self._labels = torch.from_numpy(reader.labels.astype(np.int64)).to(device)
        self._choose, self._part, self._device = choose, part, device
        self._uploaded = 1 if device.type == "cpu" else UPLOADED_STEPS
        self._first, self._rows = -1, torch.empty(0)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Return x and labels of a step."""
        if not self._first <= step < self._first + len(self._rows):
            chosen = np.stack([self._choose(s)[self._part] for s in range(step, step + self._uploaded)])
            self._first, self._rows = step, torch.from_numpy(chosen).to(self._device)
        rows = self._rows[step - self._first]
        stored, labels = self._stored[rows], self._labels[rows]
        if self._affine is None:
            return self._normalizer.normalize(stored), labels
        return self._affine(stored, None if self._which is None else self._which[rows]), labels


class Prefetched:
    """Batches that are prepared while the previous step computes, and normalised on the device."""

    def __init__(
        self,
        reader: Reader,
        normalizer: Normalizer,
        prepare: Callable[[int], Batch],
        device: torch.device,
        steps: int,
    ) -> None:
        self._device = device
        self._affine: Affine | None = normalizer.fused(*reader.affine).to(device) if reader.quantizers else None
        self._normalizer = normalizer.to(device)
        self._prefetcher = Prefetcher(lambda step: _tensors(prepare(step), device), steps, threaded=True)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Return x and labels of a step."""
        stored, labels, *which = (tensor.to(self._device, non_blocking=True) for tensor in self._prefetcher(step))
        if self._affine is None:
            return self._normalizer.normalize(stored), labels
        return self._affine(stored, which[0] if which else None), labels


class FromHost(Prefetched):
    """Reads batches from memory or mapped files."""

    def __init__(
        self,
        reader: Indexed,
        normalizer: Normalizer,
        choose: Choose,
        part: slice,
        device: torch.device,
        steps: int,
    ) -> None:
        super().__init__(reader, normalizer, lambda step: reader.read(choose(step)[part]), device, steps)


class FromStream(Prefetched):
    """Reads shard after shard of a split that fits nowhere; each rank its own stretch of an epoch's shards.

    Raises StorageError where an epoch has no whole batch for every rank, or ranks would have unequal batches.
    """

    def __init__(
        self,
        reader: Streamed,
        normalizer: Normalizer,
        batch: int,
        seed: int,
        ranks: Ranks,
        steps: int,
        classes: int | None,
        *,
        one_each: bool,
    ) -> None:
        own, rest = divmod(batch, ranks.world)
        if rest:
            raise StorageError(
                f"{reader.name}: does not fit into memory, and is streamed in equal batches: batch {batch} is no "
                f"multiple of dispatch.devices={ranks.world}; set one that is"
            )
        self._reader = reader.for_training(own, one_each)
        self._order = Order(own, mix(seed, stage_number("stream")), drop_last=True, rank=ranks.rank, world=ranks.world)
        self._steps = self._order.steps(self._reader.rows)
        if not self._steps:
            raise StorageError(f"{reader.name}: has {self._reader.rows} images, less than a batch of {batch}: lower it")
        self._next = -1
        self._batches: Iterator[Batch] = iter(())
        self._classes = classes
        if ranks.rank == 0:
            logger.warning(
                "%s: is streamed: it does not fit into memory, or did not when the training began", reader.name
            )
        super().__init__(self._reader, normalizer, self._read, ranks.device, steps)

    def _read(self, step: int) -> Batch:
        epoch, within = divmod(step, self._steps)
        if step != self._next or within == 0:
            self._batches = self._reader.batches(self._order, epoch, within)
        self._next = -1  # a step that fails is read again where it is asked for again
        batch = next(self._batches)
        self._next = step + 1
        if self._classes is not None:
            check_labels(self._reader.name, batch.labels, self._classes)
        return batch
