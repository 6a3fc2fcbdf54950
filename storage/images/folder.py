"""The image source `folder`: images in class folders, in train/ and test/ with class folders each, or in one folder."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from functa.storage.errors import StorageError
from functa.storage.images.encoded import Original, encoded_images
from functa.storage.images.files import MAX_FILE_BYTES, BadImage
from functa.storage.images.labels import numbered, read_labels
from functa.storage.images.layout import Layout, read_layout, shown
from functa.storage.images.patterns import select, split_pattern
from functa.storage.images.rows import Rows
from functa.storage.images.source import Images
from functa.storage.places.address import open_location
from functa.storage.places.local import LocalLocation
from functa.storage.places.location import Entry, Location

if TYPE_CHECKING:
    from functa.storage.config import ImagesConfig


def open_folder(config: "ImagesConfig") -> Images:
    """Return the images of a folder. Raises StorageError: no such folder, or a layout of two meanings."""
    _check_folder(config.location)
    location, entries = select(config.location)
    entries = [entry for entry in entries if f"{location.uri}/{entry.key}" != config.labels]
    layout = read_layout(location, entries, config.labels)
    if config.labels not in ("", "none"):
        parts, classes, notes = _labelled(location, layout, config.labels)
    else:
        parts = {name: _rows(part, layout) for name, part in layout.parts.items()}
        classes, notes = layout.classes, []

    def fetch(key: str) -> Original:
        entry = location.entry(key)
        if entry is None:
            raise BadImage("no longer there")
        if entry.size > MAX_FILE_BYTES:
            raise BadImage(f"more bytes than a file may have ({MAX_FILE_BYTES})", entry.token)
        data = location.read(key)
        if len(data) != entry.size:
            raise BadImage("changed while it was read", entry.token)
        return Original(data, entry.token)

    return encoded_images(config, location, parts, classes, fetch, (*layout.notes, *notes))


def _check_folder(uri: str) -> None:
    location = open_location(split_pattern(uri)[0])
    if not isinstance(location, LocalLocation) or Path(location.uri).is_dir():
        return
    if Path(location.uri).is_file() and location.uri.lower().endswith(".npz"):
        raise StorageError(f"{location.uri}: is a file of arrays, not a folder; set images.source=npz too")
    raise StorageError(
        f"{location.uri}: no such folder; images.location is the one that holds the images, or their class folders"
    )


def _rows(entries: list[Entry], layout: Layout) -> Rows:
    """Return the rows of a split, labelled by class folder; without classes every label is 0."""
    number = {name: label for label, name in enumerate(layout.classes)}
    labels = np.zeros(len(entries), np.int32)
    if layout.depth is not None:
        labels = np.array([number[shown(entry.key.split("/")[layout.depth])] for entry in entries], np.int32)
    return Rows([shown(e.key) for e in entries], labels, [e.token for e in entries], [e.key for e in entries])


def _labelled(location: Location, layout: Layout, uri: str) -> tuple[dict[str, Rows], list[str], list[str]]:
    """Return rows by split, classes and notes, the labels from a table. Images that it does not name are left out."""
    table = read_labels(uri)
    found = {shown(entry.key) for part in layout.parts.values() for entry in part}
    if absent := [file for file in table if file not in found]:
        more = f" and {len(absent) - 1} more files" if len(absent) > 1 else ""
        raise StorageError(f"{uri}: names {absent[0]}{more}, not there; give names as they are below {location.uri}")
    try:
        numbers, classes = numbered(list(table.values()))
    except ValueError as error:
        raise StorageError(f"{uri}: {error}") from None
    number = dict(zip(table, numbers))
    kept = {name: [e for e in part if shown(e.key) in number] for name, part in layout.parts.items()}
    rows = {
        name: Rows([shown(e.key) for e in part], np.array([number[shown(e.key)] for e in part], np.int32),
                   [e.token for e in part], [e.key for e in part])
        for name, part in kept.items()
    }  # fmt: skip
    if empty := [name for name, part in rows.items() if not part.keys]:
        raise StorageError(f"{uri}: labels no image of {location.uri}/{empty[0]}")
    unnamed = len(found) - len(table)
    return rows, classes, [f"left out {unnamed} images that {uri} does not name"] if unnamed else []
