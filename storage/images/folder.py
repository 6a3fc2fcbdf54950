"""The image source `folder`: images in class folders, in train/ and test/ with class folders each, or in one folder."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from functa.storage.errors import StorageError
from functa.storage.images.encoded import Original, encoded_by_key, encoded_images
from functa.storage.images.files import MAX_FILE_BYTES, BadImage
from functa.storage.images.labels import numbered, read_labels
from functa.storage.images.layout import Layout, file_names, read_layout, shown
from functa.storage.images.patterns import select_listing, split_pattern
from functa.storage.images.rows import Rows
from functa.storage.images.source import Images, SplitOfKeys
from functa.storage.places.address import open_location
from functa.storage.places.local import LocalLocation
from functa.storage.places.location import Location
from functa.storage.texts import Texts, taken

if TYPE_CHECKING:
    from functa.storage.config import ImagesConfig


def open_folder(config: "ImagesConfig") -> Images:
    """Return the images of a folder. Raises StorageError: no such folder, or a layout of two meanings."""
    _check_folder(config.location)
    location, listing = select_listing(config.location)
    table = config.labels.removeprefix(f"{location.uri}/")
    if table != config.labels and table in listing.keys:
        kept = np.array([row for row, key in enumerate(listing.keys) if key != table], np.int64)
        listing = listing.take(kept)
    layout = read_layout(location, listing, config.labels)
    every = Rows(_shown(listing.keys), layout.labels, listing.tokens, listing.keys)
    if config.labels not in ("", "none"):
        parts, classes, notes = _labelled(location, every, layout, config.labels)
    else:
        parts = {name: every.take(rows) for name, rows in layout.parts.items()}
        classes, notes = layout.classes, []
    return encoded_images(config, location, parts, classes, partial(_fetch, location), (*layout.notes, *notes))


def _shown(keys: Texts) -> Texts:
    return keys if keys.is_utf8() else Texts.of(map(shown, keys))


def read_files(config: "ImagesConfig", shape: tuple[int, int, int]) -> SplitOfKeys:
    """Return the function from keys to a split of these images: a key is a file's name below the folder."""
    location = open_location(split_pattern(config.location)[0])

    def fetch(key: str) -> Original:
        name, *others = file_names(key)
        return _fetch(location, others[0] if others and not location.exists(name) else name)

    return encoded_by_key(config, location, shape, fetch)


def _fetch(location: Location, key: str) -> Original:
    found = location.versioned(key, MAX_FILE_BYTES)
    if found is None:
        raise BadImage("no longer there")
    entry, data = found
    if entry.size > MAX_FILE_BYTES:
        raise BadImage(f"more bytes than a file may have ({MAX_FILE_BYTES})", entry.token)
    if len(data) != entry.size:
        raise BadImage("changed while it was read", entry.token)
    return Original(data, entry.token)


def _check_folder(uri: str) -> None:
    location = open_location(split_pattern(uri)[0])
    if not isinstance(location, LocalLocation) or Path(location.uri).is_dir():
        return
    if Path(location.uri).is_file() and location.uri.lower().endswith(".npz"):
        raise StorageError(f"{location.uri}: is a file of arrays, not a folder; set images.source=npz too")
    raise StorageError(
        f"{location.uri}: no such folder; images.location is the one that holds the images, or their class folders"
    )


def _labelled(
    location: Location, every: Rows, layout: Layout, uri: str
) -> tuple[dict[str, Rows], list[str], list[str]]:
    """Return rows by split, classes and notes, the labels from a table. Images that it does not name are left out."""
    table = read_labels(uri)
    keys = {name: taken(every.keys, rows) for name, rows in layout.parts.items()}
    absent = table.keys() - {key for part in keys.values() for key in part}
    if absent:
        first = next(file for file in table if file in absent)
        more = f" and {len(absent) - 1} more files" if len(absent) > 1 else ""
        raise StorageError(f"{uri}: names {first}{more}, not there; give names as they are below {location.uri}")
    try:
        numbers, classes = numbered(list(table.values()))
    except ValueError as error:
        raise StorageError(f"{uri}: {error}") from None
    number = dict(zip(table, numbers.tolist()))
    rows = {}
    for name, part in layout.parts.items():
        labels = np.array([number.get(key, -1) for key in keys[name]], np.int32)
        rows[name] = replace(every.take(part[labels >= 0]), labels=labels[labels >= 0])
    if empty := [name for name, part in rows.items() if not len(part.keys)]:
        raise StorageError(f"{uri}: labels no image of {location.uri}/{empty[0]}")
    unnamed = sum(map(len, layout.parts.values())) - len(table)
    return rows, classes, [f"left out {unnamed} images that {uri} does not name"] if unnamed else []
