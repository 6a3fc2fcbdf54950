"""Images of every source alike: two splits of keyed, labelled, square uint8 pixels; unreadable ones are named."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

import numpy as np

from functa.storage.errors import StorageError
from functa.storage.images.files import Decoded
from functa.storage.images.sources import find_source
from functa.storage.places.allowed import check_allowed

if TYPE_CHECKING:
    from functa.storage.config import ImagesConfig


LEAST_THREADS = 4

View = Callable[[Decoded], np.ndarray]  # of an image: uint8 [H, W, C]


@dataclass(frozen=True)
class ImageBatch:
    """Rows as read: images uint8 [n, H, W, C] (bad rows zero), good bool [n], position -> reason, sha256 uint8 [n, 32].

    The sha256 is of the input bytes: the file's, or the array row's; tokens are the versions that were read.
    """

    images: np.ndarray
    good: np.ndarray
    reasons: dict[int, str]
    sha256: np.ndarray
    tokens: list[str]


@dataclass(frozen=True)
class Picture:
    """One image: each view's pixels uint8 [H, W, C], or None with the reason; sha256 of the input bytes, its token."""

    pixels: list[np.ndarray] | None
    reason: str
    sha256: bytes
    token: str


def read_threads() -> int:
    """Return the number of threads that read images: the cores that this process may use, shared with its ranks.

    Decoders and the file system let go of the interpreter lock; over a network, more threads than cores still help.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(LEAST_THREADS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@dataclass(frozen=True)
class ImageSplit:
    """A split: stable unique keys, labels int32 [n], cheap version tokens, and how a row is read."""

    keys: Sequence[str]
    labels: np.ndarray
    tokens: Sequence[str]
    shape: tuple[int, int, int]
    read_row: Callable[[int, Sequence[View | None]], Picture]
    source: np.ndarray | None = None  # uint8 [n, h, w, C], where the source is an array that is in memory anyway

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def pixels(self) -> np.ndarray | None:
        """All rows as uint8 [n, H, W, C] where the source holds them as they are; None where they must be read."""
        return self.source if self.source is not None and self.source.shape[1:] == self.shape else None

    def read(self, rows: np.ndarray | Sequence[int], views: Sequence[View | None] | None = None) -> ImageBatch:
        """Return the rows in the order asked for. An unreadable one is bad with its reason; nothing shifts.

        views: what makes each row's pixels of the decoded image; None is the image as it is. Of rows side by side that
        are the same image, the image is read once.
        """
        wanted = [(int(row), None if views is None else views[i]) for i, row in enumerate(rows)]
        runs = [(row, [view for _, view in run]) for row, run in groupby(wanted, itemgetter(0))]
        threads = 1 if self.pixels is not None and views is None else read_threads()
        if threads > 1 and len(runs) > 1:
            with ThreadPoolExecutor(threads) as pool:
                pictures = list(pool.map(lambda run: self.read_row(*run), runs))
        else:
            pictures = [self.read_row(*run) for run in runs]
        images = np.zeros((len(wanted), *self.shape), np.uint8)
        good = np.zeros(len(wanted), bool)
        sha256 = np.zeros((len(wanted), 32), np.uint8)
        reasons: dict[int, str] = {}
        tokens: list[str] = []
        for (_, of_run), picture in zip(runs, pictures, strict=True):
            places = slice(len(tokens), len(tokens) + len(of_run))
            sha256[places] = np.frombuffer(picture.sha256, np.uint8)
            if picture.pixels is None:
                reasons |= dict.fromkeys(range(places.start, places.stop), picture.reason)
            else:
                images[places] = picture.pixels
                good[places] = True
            tokens += [picture.token] * len(of_run)
        return ImageBatch(images, good, reasons, sha256, tokens)


SplitOfKeys = Callable[[Sequence[str]], ImageSplit]  # of any images, each read by its key


@dataclass(frozen=True)
class Images:
    """A source: channels C, resolution H = W, class names, two splits, and what the user should know of it."""

    channels: int
    resolution: int
    classes: list[str]
    splits: dict[str, ImageSplit]
    notes: tuple[str, ...] = ()

    def split(self, name: str) -> ImageSplit:
        """The split "train" or "test"."""
        return self.splits[name]


_opened: ContextVar[dict[str, Images] | None] = ContextVar("opened", default=None)


@contextmanager
def listed_once() -> Iterator[None]:
    """List a source once for all who open it inside, in this thread and in those that get its context.

    Arrays are read anew each time: kept, they would take their memory for as long. An image that changes after the
    listing has another version token when it is read.
    """
    if _opened.get() is not None:
        yield
        return
    token = _opened.set({})
    try:
        yield
    finally:
        _opened.reset(token)


def open_images(config: "ImagesConfig") -> Images:
    """Open a source. Raises StorageError, one line: what is missing or wrong in it, and the fix."""
    kept, key = _opened.get(), config.model_copy(update={"classes": None}).model_dump_json()
    images = _open(config) if kept is None or key not in kept else kept[key]
    if kept is not None and all(split.source is None for split in images.splits.values()):
        kept[key] = images
    if config.classes not in (None, len(images.classes)):
        raise StorageError(
            f"{config.location or config.source}: has {len(images.classes)} classes, not images.classes="
            f"{config.classes}; leave that empty, or look whether class folders are missing"
        )
    return images


def open_keys(config: "ImagesConfig", shape: tuple[int, int, int]) -> SplitOfKeys:
    """Return the function from keys to a split of these images, of shape [H, W, C]; files are not listed for it.

    A key that names no image is a bad row, and labels are 0. Tokens are those of the versions that are read.
    """
    if config.location:
        check_allowed(config.location)
    source = find_source(config.source)
    if source.by_key:
        found: SplitOfKeys = source.open_keys(config, shape)
        return found
    resolution, _, channels = shape
    # All splits and no limit: another image may have moved one to the other split, or beyond the limit.
    everything = {"limit": None, "classes": None, "resolution": resolution, "channels": channels}
    splits = list(open_images(config.model_copy(update=everything)).splits.values())
    rows = {key: (split, row) for split in splits for row, key in enumerate(split.keys)}

    def of_keys(keys: Sequence[str]) -> ImageSplit:
        def read_row(row: int, views: Sequence[View | None]) -> Picture:
            if keys[row] not in rows:
                return Picture(None, "no longer there", bytes(32), "")
            split, there = rows[keys[row]]
            return split.read_row(there, views)

        return ImageSplit(list(keys), np.zeros(len(keys), np.int32), [""] * len(keys), shape, read_row)

    return of_keys


def _open(config: "ImagesConfig") -> Images:
    if config.location:
        check_allowed(config.location)
    images: Images = find_source(config.source).open(config)
    return images


def seen(image: Decoded, resolution: int, views: Sequence[View | None]) -> list[np.ndarray]:
    return [image.square(resolution) if view is None else view(image) for view in views]
