"""Files that hold many images each (tars, tables): which there are, and to which split each belongs."""

import io
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from functa.storage.errors import StorageError
from functa.storage.images.files import BadImage, is_hidden
from functa.storage.images.labels import numbered
from functa.storage.images.layout import SPLITS, TEST_NAMES, file_names
from functa.storage.images.patterns import select, split_pattern
from functa.storage.images.rows import Rows
from functa.storage.places.address import open_location
from functa.storage.places.local import LocalLocation
from functa.storage.places.location import Entry, Location

_WORD = re.compile(r"[^A-Za-z]+")

BLOCK = 1 << 20  # bytes that one request for a part of a file reads


@dataclass(frozen=True)
class Item:
    """An image in a shard: its key, its label as text (None: it has none), and where to find it."""

    key: str
    label: str | None
    origin: str


def find_shards(uri: str, endings: Sequence[str], source: str) -> tuple[Location, dict[str, list[Entry]]]:
    """Return the location and the shards of "train" and "test", or of "all".

    A shard's split is the word train, or test or val, in its name or its folders; train alone is split as a whole.
    Raises StorageError where no file has one of the endings, only some have such a word, or there are three splits.
    """
    location, entries = _select(uri)
    entries = [entry for entry in entries if not is_hidden(entry.key)]
    shards = [entry for entry in entries if entry.key.lower().endswith(tuple(endings)) and not _is_cache(entry.key)]
    if not shards:
        other = next((e.key for e in entries if e.key.lower().endswith((".gz", ".zst", ".bz2", ".xz"))), None)
        why = f"; {other} is compressed as a whole: unpack it to {endings[0]}" if other else ""
        raise StorageError(f"{uri}: no {' or '.join(endings)} files there, which images.source={source} reads{why}")
    words = {entry.key: _split_words(entry.key) for entry in shards}
    if unclear := [key for key, found in words.items() if len(found) > 1]:
        raise StorageError(f"{location.uri}/{unclear[0]}: its name has {' and '.join(sorted(words[unclear[0]]))}")
    splits = sorted({word for found in words.values() for word in found})
    without = [key for key, found in words.items() if not found]
    if not splits or (splits == ["train"] and not without):
        return location, {"all": shards}
    if without:
        raise StorageError(
            f"{location.uri}/{without[0]}: its name has none of {', '.join(splits)}, which others have; name the ones "
            f"that count by a pattern"
        )
    if len(splits) != 2 or "train" not in splits:
        raise StorageError(
            f"{location.uri}: has shards of {', '.join(splits)}; expected train, and test or val: name the ones that "
            f"count, as in {location.uri}/{{train,val}}-*{endings[0]}"
        )
    test = next(word for word in splits if word != "train")
    return location, {s: [e for e in shards if word in words[e.key]] for s, word in zip(SPLITS, ("train", test))}


def shards_location(uri: str) -> Location:
    """Return the location that keys of a source's images are below."""
    base, pattern = split_pattern(uri)
    location = open_location(base)
    found = None if pattern else _above(location)
    return location if found is None else found[0]


class ShardsByKey:
    """The shards of a source, each opened when the first of its images is asked for.

    origins: from a shard's entry to the origin of each of its images, by key.
    """

    def __init__(
        self, location: Location, endings: Sequence[str], origins: Callable[[Entry], Mapping[str, str]]
    ) -> None:
        self._location, self._endings, self._origins = location, tuple(endings), origins
        self._known: dict[str, Mapping[str, str]] = {}  # by the shard's name as keys show it
        self._lock = threading.Lock()

    def origin(self, key: str) -> str:
        """Return where an image is. Raises BadImage where it is in no shard; StorageError for a damaged one."""
        parts = key.split("/")
        names = ["/".join(parts[:end]) for end in range(1, len(parts))]
        for name in (name for name in names if name.lower().endswith(self._endings)):
            with self._lock:
                if name not in self._known:
                    entries = (self._location.entry(file) for file in file_names(name))
                    entry = next((entry for entry in entries if entry is not None), None)
                    self._known[name] = {} if entry is None else self._origins(entry)
            if key in self._known[name]:
                return self._known[name][key]
        raise BadImage("no longer there")


def _above(location: Location) -> tuple[Location, Entry] | None:
    """Return the folder of a location that is one shard, and the shard's entry; None where it is a folder."""
    folder, _, name = location.uri.rpartition("/")
    if not name or folder.endswith("/"):
        return None
    above = replace(location, uri=folder)  # of which only the shard is read, which was allowed
    entry = above.entry(name)
    return None if entry is None else (above, entry)


def _select(uri: str) -> tuple[Location, list[Entry]]:
    """Return the entries that a pattern, a folder, or one file names."""
    base, pattern = split_pattern(uri)
    location = open_location(base)
    if not pattern and (found := _above(location)) is not None:
        return found[0], [found[1]]
    if isinstance(location, LocalLocation) and not Path(location.uri).exists():
        raise StorageError(f"{uri}: is missing; images.location is a folder of shards, a pattern, or one shard")
    return select(uri)


def _is_cache(key: str) -> bool:
    """Return whether a file is one that Hugging Face's library keeps beside its data: results of map and shuffle."""
    name = key.rpartition("/")[2]
    return name.endswith(".arrow") and name.startswith(("cache-", "indices", "tmp"))


def _split_words(key: str) -> set[str]:
    """Return the splits that a shard's name or, if it has none, its folders name."""
    folders, _, name = key.rpartition("/")
    known = {"train", *TEST_NAMES}
    return (known & set(_WORD.split(name.lower()))) or (known & set(_WORD.split(folders.lower())))


def rows_of_items(
    items: dict[str, list[Item]], tokens: dict[str, str], names: Sequence[str], uri: str, labels: str
) -> tuple[dict[str, Rows], list[str], list[str]]:
    """Return rows by split, class names and notes of a source's images.

    tokens: of each shard, by its key; an origin is that key and two numbers between colons. names: the classes, where
    the source lists them. Raises StorageError for keys that repeat, labels outside the classes, or images of which
    some have none.
    """
    every = [item for part in items.values() for item in part]
    if not every:
        raise StorageError(f"{uri}: its shards hold no image")
    _refuse_equal_keys([item.key for item in every], uri)
    given = [] if labels == "none" else [item for item in every if item.label is not None]
    if given and len(given) < len(every):
        missing = next(item for item in every if item.label is None)
        raise StorageError(
            f"{uri}: {missing.key} has no label, and {len(given)} images have one; label all of them, or read them "
            f"without classes (images.labels=none)"
        )
    notes: list[str] = []
    classes: list[str] = []
    if not given:
        numbers = np.zeros(len(every), np.int32)
        if labels != "none":
            notes.append(f"{uri}: the images have no labels, so there are no classes")
    else:
        try:
            numbers, classes = numbered([str(item.label) for item in given], names)
        except ValueError as error:
            raise StorageError(f"{uri}: {error}") from None
    rows: dict[str, Rows] = {}
    start = 0
    for split, part in items.items():
        of_part = numbers[start : start + len(part)]
        origins = [item.origin for item in part]
        rows[split] = Rows(
            [item.key for item in part], of_part, [tokens[o.rsplit(":", 2)[0]] for o in origins], origins
        )
        start += len(part)
    return rows, classes, notes


def _refuse_equal_keys(keys: list[str], uri: str) -> None:
    if len(set(keys)) == len(keys):
        return
    seen: set[str] = set()
    twice = next(key for key in keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    raise StorageError(f"{uri}: {twice} is there twice; every image needs a name of its own in its shard")


class _Parts(io.RawIOBase):
    """A file that is read in parts through a location."""

    def __init__(self, location: Location, entry: Entry) -> None:
        self._location, self._entry, self._at = location, entry, 0

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer from the position on; return how many bytes were left for it."""
        wanted = min(len(buffer), self._entry.size - self._at)
        data = self._location.read_part(self._entry.key, self._at, wanted) if wanted > 0 else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Set the position, from the start (0), from here (1) or from the end (2)."""
        at = offset + (0, self._at, self._entry.size)[whence]
        if at < 0:
            raise ValueError(f"byte {at} of a file")
        self._at = at
        return at

    def seekable(self) -> bool:
        """A parser may seek."""
        return True

    def readable(self) -> bool:
        """A parser may read."""
        return True


def open_parts(location: Location, entry: Entry, block: int = BLOCK) -> io.BufferedReader:
    """Open a file for a parser that seeks in it; at least `block` bytes are read at once."""
    return io.BufferedReader(_Parts(location, entry), block)
