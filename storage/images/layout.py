"""The layout of a folder of images: its splits, its classes, and what is left out of it.

Images may lie in class folders, or all in one folder without classes; in train/ and test/ (or val/), or unsplit.

A layout that can be meant in two ways is refused, with the names: a guess would give figures that look right.
"""

import os
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from functa.storage.errors import StorageError
from functa.storage.images.files import ENDINGS, is_hidden, left_out
from functa.storage.places.local import LocalLocation
from functa.storage.places.location import Listing, Location
from functa.storage.texts import MARGIN, Texts

SPLITS = ("train", "test")

TEST_NAMES = ("test", "val", "valid", "validation")  # that the second split of others may have

SPLIT_WORDS = {"train", "training", "test", "testing", "val", "valid", "validation", "eval", "dev"}

OUTPUT_MARK = ".functa-output"  # in a folder that a command wrote images to

# Of a run's root; the images of its report, of decoding and of sampling are no data.
_OURS = re.compile(rf"(?:(?P<root>.*)/)?(?:stages/(?:meta_train|encode)\.json|{re.escape(OUTPUT_MARK)})")

_ESCAPED = re.compile(r"\\x([89a-f][0-9a-f])")  # a byte that is no UTF-8, as shown() writes it

NAMED = 3  # names in a message


@dataclass(frozen=True)
class Layout:
    """The images of a listing: its rows int64 of "train" and "test", or of "all", and the labels int32 of all rows.

    depth: of class folders in keys; None where the images lie in no class folders, and all labels are 0. notes: what
    the user should know. Every part of a key is text: see shown().
    """

    parts: dict[str, np.ndarray]
    labels: np.ndarray
    depth: int | None
    classes: list[str]
    notes: tuple[str, ...]


class _Files:
    """The files of a listing by folder: of millions of files only their folders are looked at one by one."""

    def __init__(self, listing: Listing) -> None:
        keys = self.keys = listing.keys
        number = {folder: i for i, folder in enumerate(dict.fromkeys(listing.folders))}
        self.folders = [folder.rstrip("/") for folder in number]
        self.folder_of = np.repeat(np.array([number[folder] for folder in listing.folders], np.int32), listing.counts)
        lengths = [len(folder.encode("utf-8", "surrogatepass")) for folder in number]
        above = np.array(lengths, np.int64)[self.folder_of]
        hidden = np.array([is_hidden(folder) for folder in self.folders], bool)[self.folder_of]
        hidden |= keys.bytes_at(above) == ord(".")
        has_ending = _have_endings(keys)
        self.outputs = sorted(
            {found["root"] or "" for key in keys.take(np.flatnonzero(~has_ending)) if (found := _OURS.fullmatch(key))}
        )
        ours = np.array([self._is_ours(folder) for folder in self.folders], bool)[self.folder_of]
        is_image = has_ending & ~hidden
        self.images, self.ours = np.flatnonzero(is_image & ~ours), np.flatnonzero(is_image & ours)
        self._others, self._unknown = np.flatnonzero(~is_image & ~hidden), np.flatnonzero(~is_image & ~hidden & ~ours)

    def _is_ours(self, folder: str) -> bool:
        return any(folder == root or folder.startswith(f"{root}/") for root in self.outputs)

    @property
    def others(self) -> Texts:
        """Files that are no images and not hidden."""
        return self.keys.take(self._others)

    @property
    def unknown(self) -> Texts:
        """Those of them that this project did not write."""
        return self.keys.take(self._unknown)

    @cached_property
    def image_folders(self) -> list[str]:
        """The folders of images, in the order of their first image; "" for images that lie in none."""
        numbers, first = np.unique(self.folder_of[self.images], return_index=True)
        return [self.folders[number] for number in numbers[np.argsort(first)]]

    def first(self, holds: Callable[[str], bool]) -> str:
        """Return the first image whose folder has this property; there is one."""
        chosen = np.array([holds(folder) for folder in self.folders], bool)
        return shown(self.keys[int(self.images[chosen[self.folder_of[self.images]].argmax()])])

    def of(self, top: str) -> np.ndarray:
        """Return the rows of images below a folder."""
        below = np.array([f"{folder}/".startswith(f"{top}/") for folder in self.folders], bool)
        return self.images[below[self.folder_of[self.images]]]

    def labels(self, classes: list[str], depth: int) -> np.ndarray:
        """Return the number of each file's class, int32 [files]: of its folder at that depth."""
        number = {name: label for label, name in enumerate(classes)}
        names = [(*folder.split("/"), *[""] * depth)[depth] for folder in self.folders]
        return np.array([number.get(shown(name), 0) for name in names], np.int32)[self.folder_of]


def _have_endings(keys: Texts) -> np.ndarray:
    """Return bool [n]: which keys end as images do, in letters of either case."""
    tails = keys.tails(MARGIN)
    tails[(tails >= ord("A")) & (tails <= ord("Z"))] += ord("a") - ord("A")
    tail = tails.view(">u8").reshape(-1).astype(np.uint64)
    found = np.zeros(len(keys), bool)
    for ending in ENDINGS:
        found |= tail & np.uint64((1 << 8 * len(ending)) - 1) == np.uint64(int.from_bytes(ending.encode(), "big"))
    return found


def read_layout(location: Location, listing: Listing, labels: str) -> Layout:
    """Describe a folder of images from its files. Raises StorageError: no images, or a layout of two meanings.

    labels: where the labels come from; "" for class folders, or none where there are no folders.
    """
    _refuse_root_above(location)
    files = _Files(listing)
    if "" in files.outputs:
        raise StorageError(
            f"{location.uri}: is the root of a run, or a folder that images were decoded to; name the folder of the "
            f"original images"
        )
    unknown = left_out(files.unknown)
    if not len(files.images):
        raise StorageError(
            f"{location.uri}: no images there; expected images in it, CLASS/*, or train/CLASS/* and test/CLASS/* "
            f"({', '.join(ENDINGS)}){f'; {unknown}' if unknown else ''}{_of_other_sources(files.others)}"
        )
    folders = _split_folders(location, files)
    parts = {"all": files.images}
    if folders is not None:
        parts = {split: files.of(folder) for split, folder in zip(SPLITS, folders)}
    depth = None if labels else _depth_of_classes(location, files, 0 if folders is None else 1)
    classes = [] if depth is None else sorted({shown(folder.split("/")[depth]) for folder in files.image_folders})
    _refuse_equal_names(location, classes)
    numbers = np.zeros(len(files.keys), np.int32) if depth is None else files.labels(classes, depth)
    notes = [unknown, _listed_twice(location, files)]
    if not labels and depth is None:
        notes.append("the images lie in no class folders, so they have no classes")
    if depth == 0 and len(classes) == 1:
        notes.append(_folders_of_one_class(location, files))
    if len(files.ours):
        notes.append(f"left out {len(files.ours)} images that this project wrote, in {named(files.outputs)}")
    return Layout(parts, numbers, depth, classes, tuple(f"{location.uri}: {note}" for note in notes if note))


def _folders_of_one_class(location: Location, files: _Files) -> str:
    """Describe the folders of the only class where all images lie in several: they may be meant as the classes."""
    top = files.image_folders[0].partition("/")[0]
    folders = sorted({(*folder.split("/"), "")[1] for folder in files.image_folders})
    if len(folders) < 2 or "" in folders:
        return ""
    meant = f"images.location={location.uri}/{shown(top)}"
    return f"one class, {shown(top)}; if its folders {named(folders)} are the classes, set {meant}"


def shown(name: str) -> str:
    """A name that is valid text: file names are bytes, and bytes that are not UTF-8 become escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def file_names(key: str) -> list[str]:
    """Return the names that are shown as this key: the text itself and, if it has escapes, the one with those bytes."""
    if not _ESCAPED.search(key):
        return [key]
    name = _ESCAPED.sub(lambda found: bytes.fromhex(found[1]).decode("utf-8", "surrogateescape"), key)
    return [key, name]


def named(names: Iterable[str]) -> str:
    """The first names of a list, in words."""
    every = [shown(name) for name in names]
    more = f" and {len(every) - NAMED} more" if len(every) > NAMED else ""
    return ", ".join(every[:NAMED]) + more


def _of_other_sources(keys: Iterable[str]) -> str:
    """Return how files of other sources are read, to end a message with; empty where there is none."""
    sources = {".npz": "npz", ".tar": "webdataset", ".parquet": "parquet", ".arrow": "parquet"}
    found = next((ending for ending in sources if any(key.lower().endswith(ending) for key in keys)), None)
    return f"; {found} files are read with images.source={sources[found]}" if found else ""


def _refuse_root_above(location: Location) -> None:
    if not isinstance(location, LocalLocation):
        return
    for folder in Path(location.uri).parents:
        # Older versions let images lie beside a root's own folders.
        inside = Path(location.uri).relative_to(folder).parts[0]
        own = inside in ("runs", "checkpoints", "stages", "members", "shared") or inside.endswith(".zarr")
        if own and any((folder / "stages" / f"{stage}.json").is_file() for stage in ("meta_train", "encode")):
            raise StorageError(
                f"{location.uri}: lies in {folder}, the root of a run, and what is in there is no data; keep images "
                f"elsewhere"
            )


def _split_folders(location: Location, files: _Files) -> tuple[str, str] | None:
    """Return the folders of the training and the test split, or None. Raises StorageError for other names or places."""
    tops = {folder.partition("/")[0] for folder in files.image_folders if folder}
    if len(tops) == 2 and "train" in tops and (others := [name for name in TEST_NAMES if name in tops]):
        if "" in files.image_folders:
            raise StorageError(
                f"{location.uri}/{files.first(lambda folder: not folder)}: an image outside train/ and {others[0]}/; "
                f"move it into one"
            )
        return "train", others[0]
    meant = {top for top in tops if _folded(top) in SPLIT_WORDS}
    if meant and (meant == tops or any(_folded(top) in ("train", "test") for top in meant)):
        several = len(tops & {"train", *TEST_NAMES}) > 2
        fix = "; name the two that count, as in .../{train,val}" if several else ""
        raise StorageError(
            f"{location.uri}: has {' and '.join(shown(top) for top in sorted(tops))}; expected train/CLASS/* and "
            f"test/CLASS/* (or val/) alone, in this spelling, or class folders alone{fix}"
        )
    for top, second in (folder.split("/")[:2] for folder in files.image_folders if "/" in folder):
        if _folded(second) in ("train", "test"):
            if len(tops) > 1:
                raise StorageError(
                    f"{location.uri}: has {shown(top)}/{shown(second)}; expected train/CLASS/* and test/CLASS/*, the "
                    f"splits above the classes"
                )
            raise StorageError(
                f"{location.uri}: {shown(second)} is one level down, in {shown(top)}; name that folder instead "
                f"(images.location={location.uri}/{shown(top)})"
            )
    return None


def _depth_of_classes(location: Location, files: _Files, depth: int) -> int | None:
    """Return that depth, or None where no image lies in a class folder. Raises StorageError where only some do."""

    def is_outside(folder: str) -> bool:
        return f"{folder}/".count("/") - (not folder) <= depth

    outside = [is_outside(folder) for folder in files.image_folders]
    if not any(outside):
        return depth
    if all(outside):
        return None
    raise StorageError(
        f"{location.uri}/{files.first(is_outside)}: an image outside any class folder, and others are in one; move it "
        f"into a folder of its class, or read all of them without classes (images.labels=none)"
    )


def _folded(name: str) -> str:
    """A name without what people do not see as a difference: case, Unicode form, blanks."""
    return " ".join(unicodedata.normalize("NFKC", shown(name)).casefold().split())


def _refuse_equal_names(location: Location, classes: list[str]) -> None:
    first: dict[str, str] = {}
    for name in classes:
        other = first.setdefault(_folded(name), name)
        if other != name:
            raise StorageError(
                f"{location.uri}: classes {other!r} and {name!r} differ only in case, blanks or Unicode form; give "
                f"their folders one name"
            )


def _listed_twice(location: Location, files: _Files) -> str:
    """Describe folders that links give a second name; empty if there is none."""
    if not isinstance(location, LocalLocation):
        return ""
    first: dict[str, str] = {}
    twice = []
    for folder in files.image_folders:
        other = first.setdefault(os.path.realpath(f"{location.uri}/{folder}"), folder)
        if other != folder:
            twice.append(f"{other} = {folder}")
    if not twice:
        return ""
    return f"links list a folder's images twice, so that training images can be test images too: {named(twice)}"
