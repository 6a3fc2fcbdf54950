"""Images for training, in memory if they fit, else read on demand; unreadable ones never reach a batch."""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from functa.storage.config import ImagesConfig
from functa.storage.errors import StorageError
from functa.storage.images.source import ImageBatch, Images, ImageSplit
from functa.storage.texts import taken
from functa.tasks.config import MEMORY_BYTES

READ_ROWS = 1024

# Bad images that always pass, whatever their share: three of a split of at least 30, one of a smaller one.
FEW_BAD, FEW_ROWS = 3, 30

WHOLE = slice(None)


class Pictures:
    """One split of an image source as training batches of float32 [B, H, W, ch] in [0, 1].

    With `limit` only that many rows, spread over the split; then max_bad_fraction, a share of the whole split, does not
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
        self._bad: dict[int, str] = {}  # rows that this process could not read on demand: file and reason
        self._pixels: np.ndarray | None = None
        if len(rows) * images.resolution**2 * images.channels <= MEMORY_BYTES:
            self._load()

    def _load(self) -> None:
        """Read all into one array, in place: another copy may take gigabytes. The source's own array is not copied."""
        held, rows = self.split.pixels, len(self._rows)
        if held is not None:
            self._pixels = held if rows == len(held) else held[self._rows]
            return
        pixels, good, first = np.empty((rows, *self.split.shape), np.uint8), np.zeros(rows, bool), ""
        filled = 0
        for start in range(0, rows, READ_ROWS):
            batch = self.split.read(self._rows[start : start + READ_ROWS])
            kept = batch.images if batch.good.all() else batch.images[batch.good]
            pixels[filled : filled + len(kept)] = kept
            filled += len(kept)
            good[start : start + READ_ROWS] = batch.good
            first = first or next((self._named(start + at, why) for at, why in batch.reasons.items()), "")
        refuse_too_many_bad(rows - filled, rows, self._max_bad_fraction, self._name, first)
        self._pixels = pixels[:filled]
        self._rows, self.labels = self._rows[good], self.labels[good]

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def in_memory(self) -> bool:
        """Return whether all images are in memory."""
        return self._pixels is not None

    @property
    def keys(self) -> Sequence[str]:
        """Return the stable keys of the rows."""
        return taken(self.split.keys, self._rows)

    @property
    def digest(self) -> str:
        """Return 64 hex digits that identify the rows and their order."""
        return digest_of(self.keys)

    def batch(self, rows: np.ndarray, part: slice = WHOLE) -> Tensor:
        """Read rows as float32 [B, H, W, ch]; another image replaces an unreadable one, see read."""
        return as_float(self.read(rows, part)[0])

    def read(self, rows: np.ndarray, part: slice = WHOLE) -> tuple[np.ndarray, np.ndarray]:
        """Return pixels uint8 [B, H, W, ch] and the rows [B] that were read, which decide labels and keys.

        Only `part` of the global batch `rows` is read. If a row turns out to be unreadable, the batch's first good
        image replaces it, the same one in every process.
        Raises StorageError if none is readable, or too many of the split were unreadable so far.
        """
        rows = np.asarray(rows)
        own = rows[part]
        if self._pixels is not None:
            return self._pixels[own], own
        batch = self._read(own)
        if batch.good.all():
            return batch.images, own
        substitute, picture = self._first_readable(rows)
        batch.images[~batch.good] = picture
        return batch.images, np.where(batch.good, own, substitute)

    def _first_readable(self, rows: np.ndarray) -> tuple[int, np.ndarray]:
        """Return the first readable row and its pixels."""
        for row in rows:
            read = self._read(np.array([row]))
            if read.good[0]:
                return int(row), read.images[0]
        first = next(iter(self._bad.values()), "")
        raise StorageError(f"none of {len(rows)} {self._name} images could be read; the first: {first}")

    def _read(self, rows: np.ndarray) -> ImageBatch:
        batch = self.split.read(self._rows[rows])
        self._bad |= {int(rows[at]): self._named(int(rows[at]), why) for at, why in batch.reasons.items()}
        first = next(iter(self._bad.values()), "")
        refuse_too_many_bad(len(self._bad), len(self), self._max_bad_fraction, self._name, first)
        return batch

    def _named(self, row: int, reason: str) -> str:
        return f"{self.split.keys[self._rows[row]]}: {reason}"


def digest_of(keys: Sequence[str]) -> str:
    """Return 64 hex digits of keys, in order."""
    return hashlib.sha256("\0".join(keys).encode()).hexdigest()


def as_float(images: np.ndarray | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Convert uint8 [B, H, W, ch] to float32 in [0, 1] on the device, to which a quarter of the bytes travel.

    The same bits on every device: a GPU would multiply by the reciprocal of a number, but divides by a tensor.
    """
    pixels = torch.from_numpy(images) if isinstance(images, np.ndarray) else images
    return pixels.to(device, non_blocking=True).float() / torch.full((), 255.0, device=device)


def pinned(images: np.ndarray, device: torch.device) -> np.ndarray:
    """Return images in memory from which a GPU copies them while others compute; on a CPU these ones."""
    return torch.from_numpy(images).pin_memory().numpy() if device.type == "cuda" else images


def spread(rows: int, count: int) -> np.ndarray:
    """Return `count` rows spread evenly over all."""
    return np.unique(np.linspace(0, rows - 1, count).round().astype(np.int64))


def refuse_too_many_bad(bad: int, rows: int, limit: float, split: str, first: str) -> None:
    """Raise StorageError if more of a split's images are bad than allowed_bad. `first` is one: `FILE: reason`."""
    if bad > allowed_bad(rows, limit):
        enough = math.ceil(100 * bad / rows) / 100
        raise StorageError(
            f"{bad} of {rows} {split} images cannot be used, more than images.max_bad_fraction={limit:g} allows; "
            f"the first: {first}; repair or remove {'it' if bad == 1 else 'them'}, or allow this many: --set "
            f"images.max_bad_fraction={enough:g}"
        )


def allowed_bad(rows: int, limit: float) -> float:
    """Return how many bad images a split of so many rows may have: the share `limit`, and always a few.

    One broken file must not stop a run on a few dozen photographs. A limit of 0 allows none.
    """
    few = FEW_BAD if rows >= FEW_ROWS else 1
    return max(limit * rows, min(few, rows - 1) if limit else 0)


def as_uint8(images: Tensor) -> np.ndarray:
    """Convert float images in [0, 1] to uint8, rounded."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def to_picture(image: np.ndarray) -> Image.Image:
    """Return an image uint8 [H, W, 1 or 3] as Pillow has it, to be written as a file."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
