"""Images of every source alike: two splits of keyed, labelled, square uint8 pixels; unreadable ones are named.

Sources: scikit-learn's digits, a folder of class folders, torchvision sets, npz arrays.
"""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from functa.storage.config import ImagesConfig
from functa.storage.errors import StorageError, TransientError
from functa.storage.images.arrays import ArraySource, read_digits, read_npz, read_torchvision
from functa.storage.images.files import ENDINGS, MAX_FILE_BYTES, BadImage, decode, fit
from functa.storage.places.address import open_location
from functa.storage.places.local import LocalLocation, may_pass
from functa.storage.places.location import Entry, Location

if TYPE_CHECKING:
    from PIL import Image


View = Callable[["Image.Image"], np.ndarray]  # of a decoded image: uint8 [H, W, C]

READ_THREADS = 4  # Pillow's decoders and the file system let go of the interpreter lock


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


@dataclass(frozen=True)
class ImageSplit:
    """A split: stable unique keys, labels int32 [n], cheap version tokens, and how a row is read."""

    keys: list[str]
    labels: np.ndarray
    tokens: list[str]
    shape: tuple[int, int, int]
    read_row: Callable[[int, Sequence[View | None]], Picture]
    threads: int = 1
    source: np.ndarray | None = None  # uint8 [n, h, w, C], where the source is an array that is in memory anyway

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def pixels(self) -> np.ndarray | None:
        """All rows as uint8 [n, H, W, C] where the source holds them as they are; None where they must be read."""
        return self.source if self.source is not None and self.source.shape[1:] == self.shape else None

    def read(self, rows: np.ndarray | Sequence[int], views: Sequence[View | None] | None = None) -> ImageBatch:
        """The rows, in the order asked for. An unreadable one is bad with its reason; nothing shifts.

        views: what makes each row's pixels of the decoded image; None is the image as it is. Of rows side by side that
        are the same image, the image is read once.
        """
        wanted = [(int(row), None if views is None else views[place]) for place, row in enumerate(rows)]
        runs = [(row, [view for _, view in run]) for row, run in groupby(wanted, itemgetter(0))]
        if self.threads > 1 and len(runs) > 1:
            with ThreadPoolExecutor(self.threads) as pool:
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


@dataclass(frozen=True)
class Images:
    """A source: channels C, resolution H = W, class names, two splits."""

    channels: int
    resolution: int
    classes: list[str]
    splits: dict[str, ImageSplit]

    def split(self, name: str) -> ImageSplit:
        """The split "train" or "test"."""
        return self.splits[name]


@dataclass(frozen=True)
class _Rows:
    """Keys, labels and tokens of one split, before limits, and the index or file of each row."""

    keys: list[str]
    labels: np.ndarray
    tokens: list[str]
    origins: list[str]

    def take(self, rows: np.ndarray) -> "_Rows":
        return _Rows(
            [self.keys[i] for i in rows],
            self.labels[rows],
            [self.tokens[i] for i in rows],
            [self.origins[i] for i in rows],
        )


def open_images(config: ImagesConfig) -> Images:
    """Open a source. Raises StorageError, one line: what is missing or wrong in it, and the mend."""
    images = _open(config)
    if config.classes not in (None, len(images.classes)):
        raise StorageError(
            f"{config.location or config.source}: has {len(images.classes)} classes, not images.classes="
            f"{config.classes}; leave that empty, or look whether class folders are missing"
        )
    return images


def _open(config: ImagesConfig) -> Images:
    if config.source == "folder":
        return _open_folder(config)
    if config.source == "digits":
        return _from_arrays(config, read_digits(config.test_fraction, config.split_seed))
    if config.source == "torchvision":
        return _from_arrays(config, read_torchvision(config.location, config.dataset))
    return _from_arrays(config, _split_source(config, read_npz(config.location)))


def _limited(rows: _Rows, limit: int | None) -> _Rows:
    """At most `limit` rows: the first of each class, classes in turn, in their order."""
    if limit is None or len(rows.keys) <= limit:
        return rows
    turn = np.zeros(len(rows.labels), np.int64)
    for label in np.unique(rows.labels):
        mine = rows.labels == label
        turn[mine] = np.arange(mine.sum())
    return rows.take(np.sort(np.lexsort((rows.labels, turn))[:limit]))


def _stratified(keys: Sequence[str], labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(train rows, test rows): of each class the share `fraction`, at least one each, chosen by a hash of the key."""
    rank = np.array([hashlib.sha256(f"{seed}\0{key}".encode()).digest()[:8] for key in keys], "S8")
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        if len(mine) < 2:
            raise StorageError(f"{keys[mine[0]]}: is alone in its class, and a split needs 2; or make train/ and test/")
        count = min(max(1, round(fraction * len(mine))), len(mine) - 1)
        held_out[mine[np.argsort(rank[mine], kind="stable")[:count]]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


# --- arrays -----------------------------------------------------------------------------------------------------


def _split_source(config: ImagesConfig, sources: dict[str, ArraySource]) -> dict[str, ArraySource]:
    """A single npz file's rows ("all") become a training and a test split."""
    if "all" not in sources:
        return sources
    whole = sources["all"]
    train, test = _stratified(whole.keys, whole.labels, config.test_fraction, config.split_seed)
    return {"train": whole.take(train), "test": whole.take(test)}


def _from_arrays(config: ImagesConfig, sources: dict[str, ArraySource]) -> Images:
    train = sources["train"]
    height, width, native = train.images.shape[1:]
    if config.resolution is None and height != width:
        raise StorageError(f"images are {width}x{height} and must be square; set images.resolution")
    resolution = config.resolution or height
    channels = config.channels or native
    splits = {}
    for name, source in sources.items():
        if source.images.shape[1:] != train.images.shape[1:]:
            raise StorageError(f"images of the splits differ: {train.images.shape[1:]} and {source.images.shape[1:]}")
        indices = [str(i) for i in range(len(source.keys))]
        # The label too: a file that changes class changes its key, an array's row does not.
        labelled = zip(source.images, source.labels.astype("<i4"))
        tokens = [hashlib.sha256(image.tobytes() + label.tobytes()).hexdigest()[:16] for image, label in labelled]
        rows = _limited(_Rows(source.keys, source.labels, tokens, indices), config.limit)
        whole = len(rows.origins) == len(source.images)
        images = source.images if whole else source.images[[int(i) for i in rows.origins]]
        splits[name] = _array_split(rows, images, resolution, channels)
    return Images(channels, resolution, train.classes, splits)


def _array_split(rows: _Rows, images: np.ndarray, resolution: int, channels: int) -> ImageSplit:
    as_they_are = images.shape[1:] == (resolution, resolution, channels)

    def read_row(row: int, views: Sequence[View | None] = (None,)) -> Picture:
        from PIL import Image

        raw = images[row]  # [H, W, C]
        sha256 = hashlib.sha256(raw.tobytes()).digest()
        if as_they_are and not any(views):
            return Picture([raw] * len(views), "", sha256, rows.tokens[row])
        picture = Image.fromarray(raw[..., 0] if raw.shape[-1] == 1 else raw)
        pixels = _seen(picture.convert("L" if channels == 1 else "RGB"), resolution, views)
        return Picture(pixels, "", sha256, rows.tokens[row])

    shape = (resolution, resolution, channels)
    return ImageSplit(rows.keys, rows.labels, rows.tokens, shape, read_row, source=images)


# --- folders ----------------------------------------------------------------------------------------------------


def _open_folder(config: ImagesConfig) -> Images:
    location = open_location(config.location)
    if isinstance(location, LocalLocation) and not Path(location.uri).is_dir():
        raise StorageError(f"{location.uri}: no such folder; images.location is the one that holds the class folders")
    entries = [entry for entry in location.entries() if is_image(entry.key)]
    if not entries:
        known = ", ".join(ENDINGS)
        raise StorageError(
            f"{location.uri}: no images in class folders there; expected CLASS/*, "
            f"or train/CLASS/* and test/CLASS/* ({known})"
        )
    tops = {entry.key.partition("/")[0] for entry in entries}
    if tops == {"train", "test"}:
        parts = {split: [e for e in entries if e.key.startswith(f"{split}/")] for split in ("train", "test")}
        depth = 1
    elif "train" in tops or "test" in tops:
        raise StorageError(
            f"{location.uri}: has {' and '.join(sorted(tops))}; expected train/CLASS/* and test/CLASS/* alone, "
            "or class folders alone"
        )
    else:
        parts, depth = {"all": entries}, 0
    if any(entry.key.count("/") <= depth for entry in entries):
        loose = next(entry.key for entry in entries if entry.key.count("/") <= depth)
        raise StorageError(f"{location.uri}/{loose}: an image outside any class folder; expected CLASS/{loose}")
    classes = sorted({_shown(entry.key.split("/")[depth]) for entry in entries})
    rows = {name: _folder_rows(part, classes, depth) for name, part in parts.items()}
    if "all" in rows:
        train, test = _stratified(rows["all"].keys, rows["all"].labels, config.test_fraction, config.split_seed)
        rows = {"train": rows["all"].take(train), "test": rows["all"].take(test)}
    rows = {name: _limited(part, config.limit) for name, part in rows.items()}
    channels = config.channels or 3
    resolution = config.resolution or _first_resolution(location, rows, channels, config.max_pixels)
    splits = {name: _folder_split(location, part, resolution, channels, config) for name, part in rows.items()}
    return Images(channels, resolution, classes, splits)


def is_image(key: str) -> bool:
    """By ending, hidden files and folders left out."""
    return key.lower().endswith(ENDINGS) and not any(part.startswith(".") for part in key.split("/"))


def _shown(name: str) -> str:
    """A name that is valid text: file names are bytes, and bytes that are not UTF-8 become escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _folder_rows(entries: list[Entry], classes: list[str], depth: int) -> _Rows:
    number = {name: label for label, name in enumerate(classes)}
    labels = np.array([number[_shown(entry.key.split("/")[depth])] for entry in entries], np.int32)
    return _Rows([_shown(e.key) for e in entries], labels, [e.token for e in entries], [e.key for e in entries])


def _first_resolution(location: Location, rows: dict[str, _Rows], channels: int, max_pixels: int) -> int:
    """Of the first readable image, which the others must agree with."""
    for key in (key for part in rows.values() for key in part.origins):
        try:
            width, height = decode(location.read(key), channels, max_pixels).size
        except TransientError:
            raise  # else the resolution would depend on the network's mood
        except (BadImage, StorageError):
            continue
        if width != height:
            raise StorageError(
                f"{location.uri}/{_shown(key)}: {width}x{height} pixels, not square; set images.resolution"
            )
        return width
    raise StorageError(f"{location.uri}: not one image there is readable; look at the files")


def _seen(image: "Image.Image", resolution: int, views: Sequence[View | None]) -> list[np.ndarray]:
    return [fit(image, resolution) if view is None else view(image) for view in views]


def _folder_split(location: Location, rows: _Rows, resolution: int, channels: int, config: ImagesConfig) -> ImageSplit:
    def read_row(row: int, views: Sequence[View | None] = (None,)) -> Picture:
        key, sha256, token = rows.origins[row], bytes(32), ""
        try:
            entry = location.entry(key)
            if entry is None:
                raise BadImage("no longer there")
            token = entry.token
            if entry.size > MAX_FILE_BYTES:
                raise BadImage(f"more bytes than a file may have ({MAX_FILE_BYTES})")
            data = location.read(key)
            sha256 = hashlib.sha256(data).digest()
            if len(data) != entry.size:
                raise BadImage("changed while it was read")
            image = decode(data, channels, config.max_pixels)
            if config.resolution is None and image.size != (resolution, resolution):
                raise BadImage(
                    f"{image.width}x{image.height} pixels where the first image has {resolution}x{resolution}; "
                    "set images.resolution"
                )
            return Picture(_seen(image, resolution, views), "", sha256, token)
        except (BadImage, StorageError) as error:
            if isinstance(error, StorageError) and may_pass(location, error):
                raise  # the whole place is away: that makes no image bad
            return Picture(None, str(error), sha256, token)

    return ImageSplit(rows.keys, rows.labels, rows.tokens, (resolution, resolution, channels), read_row, READ_THREADS)
