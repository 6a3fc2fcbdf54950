"""The layout of a folder of images: its splits, its classes, and what is left out of it.

Images may lie in class folders, or all in one folder without classes; in train/ and test/ (or val/), or unsplit.

A layout that can be meant in two ways is refused, with the names: a guess would give figures that look right.
"""

import os
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from functa.storage.errors import StorageError
from functa.storage.images.files import ENDINGS, is_hidden, is_image, left_out
from functa.storage.places.local import LocalLocation
from functa.storage.places.location import Entry, Location

SPLITS = ("train", "test")

TEST_NAMES = ("test", "val", "valid", "validation")  # that the second split of others may have

SPLIT_WORDS = {"train", "training", "test", "testing", "val", "valid", "validation", "eval", "dev"}

OUTPUT_MARK = ".functa-output"  # in a folder that a command wrote images to

# Of a run's root; the images of its report, of decoding and of sampling are no data.
_OURS = re.compile(rf"(?:(?P<root>.*)/)?(?:stages/(?:meta_train|encode)\.json|{re.escape(OUTPUT_MARK)})")

NAMED = 3  # names in a message


@dataclass(frozen=True)
class Layout:
    """The images of "train" and "test", or of "all"; the depth of class folders in keys; and what the user should know.

    depth: None where the images lie in no class folders. Every part of a key is text: see shown().
    """

    parts: dict[str, list[Entry]]
    depth: int | None
    classes: list[str]
    notes: tuple[str, ...]


def read_layout(location: Location, everything: list[Entry], labels: str) -> Layout:
    """Describe a folder of images from its entries. Raises StorageError: no images, or a layout of two meanings.

    labels: where the labels come from; "" for class folders, or none where there are no folders.
    """
    _refuse_root_above(location)
    outputs = sorted({found["root"] or "" for entry in everything if (found := _OURS.fullmatch(entry.key))})
    if "" in outputs:
        raise StorageError(
            f"{location.uri}: is the root of a run, or a folder that images were decoded to; name the folder of the "
            f"original images"
        )
    images, ours = list[Entry](), list[Entry]()
    for entry in everything:
        if is_image(entry.key):
            (ours if any(entry.key.startswith(f"{root}/") for root in outputs) else images).append(entry)
    others = [entry.key for entry in everything if not is_image(entry.key) and not is_hidden(entry.key)]
    unknown = left_out(key for key in others if not any(key.startswith(f"{root}/") for root in outputs))
    if not images:
        raise StorageError(
            f"{location.uri}: no images there; expected images in it, CLASS/*, or train/CLASS/* and test/CLASS/* "
            f"({', '.join(ENDINGS)}){f'; {unknown}' if unknown else ''}{_of_other_sources(others)}"
        )
    folders = _split_folders(location, images)
    parts = {"all": images}
    if folders is not None:
        parts = {s: [e for e in images if e.key.startswith(f"{folder}/")] for s, folder in zip(SPLITS, folders)}
    depth = None if labels else _depth_of_classes(location, images, 0 if folders is None else 1)
    classes = [] if depth is None else sorted({shown(entry.key.split("/")[depth]) for entry in images})
    _refuse_equal_names(location, classes)
    notes = [unknown, _listed_twice(location, images)]
    if not labels and depth is None:
        notes.append("the images lie in no class folders, so they have no classes")
    if depth == 0 and len(classes) == 1:
        notes.append(_folders_of_one_class(location, images))
    if ours:
        notes.append(f"left out {len(ours)} images that this project wrote, in {named(outputs)}")
    return Layout(parts, depth, classes, tuple(f"{location.uri}: {note}" for note in notes if note))


def _folders_of_one_class(location: Location, images: list[Entry]) -> str:
    """Describe the folders of the only class where all images lie in several: they may be meant as the classes."""
    top = images[0].key.partition("/")[0]
    folders = sorted({entry.key.split("/")[1] if entry.key.count("/") > 1 else "" for entry in images})
    if len(folders) < 2 or "" in folders:
        return ""
    meant = f"images.location={location.uri}/{shown(top)}"
    return f"one class, {shown(top)}; if its folders {named(folders)} are the classes, set {meant}"


def shown(name: str) -> str:
    """A name that is valid text: file names are bytes, and bytes that are not UTF-8 become escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def named(names: Iterable[str]) -> str:
    """The first names of a list, in words."""
    every = [shown(name) for name in names]
    more = f" and {len(every) - NAMED} more" if len(every) > NAMED else ""
    return ", ".join(every[:NAMED]) + more


def _of_other_sources(keys: list[str]) -> str:
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


def _split_folders(location: Location, images: list[Entry]) -> tuple[str, str] | None:
    """Return the folders of the training and the test split, or None. Raises StorageError for other names or places."""
    tops = {entry.key.partition("/")[0] for entry in images if "/" in entry.key}
    if len(tops) == 2 and "train" in tops and (others := [name for name in TEST_NAMES if name in tops]):
        if outside := [entry.key for entry in images if "/" not in entry.key]:
            raise StorageError(
                f"{location.uri}/{shown(outside[0])}: an image outside train/ and {others[0]}/; move it into one"
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
    for entry in images:
        top, _, rest = entry.key.partition("/")
        below = rest.partition("/")
        if below[1] and _folded(below[0]) in ("train", "test"):
            if len(tops) > 1:
                raise StorageError(
                    f"{location.uri}: has {shown(top)}/{shown(below[0])}; expected train/CLASS/* and test/CLASS/*, the "
                    f"splits above the classes"
                )
            raise StorageError(
                f"{location.uri}: {shown(below[0])} is one level down, in {shown(top)}; name that folder instead "
                f"(images.location={location.uri}/{shown(top)})"
            )
    return None


def _depth_of_classes(location: Location, images: list[Entry], depth: int) -> int | None:
    """Return that depth, or None where no image lies in a class folder. Raises StorageError where only some do."""
    outside = [entry for entry in images if entry.key.count("/") <= depth]
    if not outside:
        return depth
    if len(outside) == len(images):
        return None
    name = shown(outside[0].key)
    raise StorageError(
        f"{location.uri}/{name}: an image outside any class folder, and others are in one; move it into a folder of "
        f"its class, or read all of them without classes (images.labels=none)"
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


def _listed_twice(location: Location, images: list[Entry]) -> str:
    """Describe folders that links give a second name; empty if there is none."""
    if not isinstance(location, LocalLocation):
        return ""
    first: dict[str, str] = {}
    twice = []
    for folder in dict.fromkeys(entry.key.rpartition("/")[0] for entry in images):
        other = first.setdefault(os.path.realpath(f"{location.uri}/{folder}"), folder)
        if other != folder:
            twice.append(f"{other} = {folder}")
    if not twice:
        return ""
    return f"links list a folder's images twice, so that training images can be test images too: {named(twice)}"
