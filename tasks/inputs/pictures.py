"""Images for training, in memory while they fit, read on demand beyond that; unreadable ones never reach a batch."""

import hashlib

import numpy as np
import torch
from torch import Tensor

from functa.storage.config import ImagesConfig
from functa.storage.errors import StorageError
from functa.storage.images.source import ImageBatch, Images, ImageSplit
from functa.tasks.config import MEMORY_BYTES

READ_ROWS = 1024

WHOLE = slice(None)


class Pictures:
    """One split of an image source as training batches of float32 [B, H, W, ch] in [0, 1].

    With `limit` only so many rows, spread over the split; then max_bad_fraction, which is of the whole split, does not
    apply: one bad image among 64 would exceed it.
    """

    def __init__(self, images: Images, split: str, config: ImagesConfig, limit: int | None = None) -> None:
        self.split: ImageSplit = images.split(split)
        self.resolution = (images.resolution, images.resolution)
        self.channels = images.channels
        rows = np.arange(len(self.split))
        if limit is not None and limit < len(rows):
            rows = spread(len(rows), limit)
        self.labels = np.asarray(self.split.labels)[rows]
        self._rows = rows
        self._name = split
        self._max_bad_fraction = config.max_bad_fraction if limit is None else 1.0
        self._bad: dict[int, str] = {}  # rows that this process found unreadable on demand, and why
        self._pixels: np.ndarray | None = None
        if len(rows) * images.resolution**2 * images.channels <= MEMORY_BYTES:
            self._load()

    def _load(self) -> None:
        """Into one array, filled in place: a copy more would be gigabytes. What the source holds is not copied."""
        held, rows = self.split.pixels, len(self._rows)
        if held is not None:
            self._pixels = held if rows == len(held) else held[self._rows]
            return
        pixels, good, reason = np.empty((rows, *self.split.shape), np.uint8), np.zeros(rows, bool), ""
        filled = 0
        for start in range(0, rows, READ_ROWS):
            batch = self.split.read(self._rows[start : start + READ_ROWS])
            kept = batch.images if batch.good.all() else batch.images[batch.good]
            pixels[filled : filled + len(kept)] = kept
            filled += len(kept)
            good[start : start + READ_ROWS] = batch.good
            reason = reason or next(iter(batch.reasons.values()), "")
        refuse_too_many_bad(rows - filled, rows, self._max_bad_fraction, self._name, reason)
        self._pixels = pixels[:filled]
        self._rows, self.labels = self._rows[good], self.labels[good]

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def in_memory(self) -> bool:
        """Whether batches need no reading."""
        return self._pixels is not None

    @property
    def keys(self) -> list[str]:
        """Stable keys of the rows."""
        keys = self.split.keys
        return [keys[i] for i in self._rows]

    @property
    def digest(self) -> str:
        """64 hex digits of which rows these are, in order."""
        return digest_of(self.keys)

    def batch(self, rows: np.ndarray, part: slice = WHOLE) -> Tensor:
        """Rows of this split -> float32 [B, H, W, ch]. An unreadable one repeats another: see batch_with_rows."""
        return self.batch_with_rows(rows, part)[0]

    def batch_with_rows(self, rows: np.ndarray, part: slice = WHOLE) -> tuple[Tensor, np.ndarray]:
        """Pixels float32 [B, H, W, ch], and the rows [B] that they really are: labels and keys go by those.

        Of the global batch `rows` only `part` is read. Read on demand, a row may turn out unreadable; the batch's
        first good one then stands in its place, whichever process asks.
        Raises StorageError when none is readable, or too many of the split were not so far.
        """
        rows = np.asarray(rows)
        own = rows[part]
        if self._pixels is not None:
            return as_float(self._pixels[own]), own
        batch = self._read(own)
        if batch.good.all():
            return as_float(batch.images), own
        instead, picture = self._stand_in(rows)
        batch.images[~batch.good] = picture
        return as_float(batch.images), np.where(batch.good, own, instead)

    def _stand_in(self, rows: np.ndarray) -> tuple[int, np.ndarray]:
        """The first row that can be read, and its pixels."""
        for row in rows:
            read = self._read(np.array([row]))
            if read.good[0]:
                return int(row), read.images[0]
        first = next(iter(self._bad.values()), "")
        raise StorageError(f"none of {len(rows)} {self._name} images could be read; the first: {first}")

    def _read(self, rows: np.ndarray) -> ImageBatch:
        batch = self.split.read(self._rows[rows])
        self._bad |= {int(rows[position]): reason for position, reason in batch.reasons.items()}
        first = next(iter(self._bad.values()), "")
        refuse_too_many_bad(len(self._bad), len(self), self._max_bad_fraction, self._name, first)
        return batch


def digest_of(keys: list[str]) -> str:
    """64 hex digits of keys, in order."""
    return hashlib.sha256("\0".join(keys).encode()).hexdigest()


def as_float(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, ch] -> float32 in [0, 1]."""
    return torch.from_numpy(images).float() / 255


def spread(rows: int, count: int) -> np.ndarray:
    """`count` rows spread evenly over all."""
    return np.unique(np.linspace(0, rows - 1, count).round().astype(np.int64))


def refuse_too_many_bad(bad: int, rows: int, limit: float, split: str, reason: str) -> None:
    """Raises StorageError when more than the share `limit` of a split's images is unreadable."""
    if bad > limit * rows:
        raise StorageError(
            f"{bad} of {rows} {split} images cannot be used, more than images.max_bad_fraction={limit:g} allows; "
            f"the first: {reason}"
        )


def as_uint8(images: Tensor) -> np.ndarray:
    """Float images in [0, 1] -> uint8, rounded."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
