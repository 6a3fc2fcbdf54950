"""Images for training, in memory while they fit, read on demand beyond that; unreadable ones never reach a batch."""

import numpy as np
import torch
from torch import Tensor

from storage.config import ImagesConfig
from storage.errors import StorageError
from storage.images import Images, ImageSplit

MEMORY_BYTES = 4 << 30
READ_ROWS = 1024


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
        self._bad: dict[int, str] = {}  # rows found unreadable on demand, and why
        self._pixels: np.ndarray | None = None
        if len(rows) * images.resolution**2 * images.channels <= MEMORY_BYTES:
            self._load()

    def _load(self) -> None:
        pixels, good, reason = [np.empty((0, *self.split.shape), np.uint8)], [np.empty(0, bool)], ""
        for start in range(0, len(self._rows), READ_ROWS):
            batch = self.split.read(self._rows[start : start + READ_ROWS])
            pixels.append(batch.images)
            good.append(batch.good)
            reason = reason or next(iter(batch.reasons.values()), "")
        keep = np.concatenate(good)
        refuse_too_many_bad(int((~keep).sum()), len(keep), self._max_bad_fraction, self._name, reason)
        self._pixels = np.concatenate(pixels)[keep]
        self._rows, self.labels = self._rows[keep], self.labels[keep]

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

    def batch(self, rows: np.ndarray) -> Tensor:
        """Rows of this split -> float32 [B, H, W, ch]. An unreadable one repeats another: see batch_with_rows."""
        return self.batch_with_rows(rows)[0]

    def batch_with_rows(self, rows: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Pixels float32 [B, H, W, ch], and the rows [B] that they really are: labels and keys go by those.

        Read on demand, a row may turn out unreadable; a good one of the batch then stands in its place.
        Raises StorageError when none is readable, or too many of the split were not so far.
        """
        rows = np.asarray(rows)
        if self._pixels is not None:
            return as_float(self._pixels[rows]), rows
        batch = self.split.read(self._rows[rows])
        self._bad |= {int(rows[position]): reason for position, reason in batch.reasons.items()}
        first = next(iter(self._bad.values()), "")
        refuse_too_many_bad(len(self._bad), len(self), self._max_bad_fraction, self._name, first)
        good = np.flatnonzero(batch.good)
        if not len(good):
            raise StorageError(f"none of {len(rows)} {self._name} images could be read; the first: {first}")
        chosen = np.where(batch.good, np.arange(len(rows)), good[0])
        return as_float(batch.images[chosen]), rows[chosen]


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
