"""The image source `folder`: a folder of class folders, or of train/ and test/ with class folders each."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from functa.storage.errors import StorageError, TransientError
from functa.storage.images.files import MAX_FILE_BYTES, BadImage, decode
from functa.storage.images.layout import SPLITS, named, read_layout, shown
from functa.storage.images.rows import Rows, limited, split_rows
from functa.storage.images.source import Images, ImageSplit, Picture, View, seen
from functa.storage.places.address import open_location
from functa.storage.places.local import LocalLocation, may_pass
from functa.storage.places.location import Entry, Location

if TYPE_CHECKING:
    from functa.storage.config import ImagesConfig

READ_THREADS = 4  # Pillow's decoders and the file system let go of the interpreter lock


def open_folder(config: "ImagesConfig") -> Images:
    location = open_location(config.location)
    if isinstance(location, LocalLocation) and not Path(location.uri).is_dir():
        if Path(location.uri).is_file() and location.uri.lower().endswith(".npz"):
            raise StorageError(f"{location.uri}: is a file of arrays, not a folder; set images.source=npz too")
        raise StorageError(f"{location.uri}: no such folder; images.location is the one that holds the class folders")
    layout = read_layout(location)
    rows = {name: _folder_rows(part, layout.classes, layout.depth) for name, part in layout.parts.items()}
    if "all" in rows:
        rows = dict(zip(SPLITS, split_rows(rows["all"], config)))
    empty = sorted({*range(len(layout.classes))} - {*rows["test"].labels.tolist()})
    names = named(layout.classes[label] for label in empty)
    untested = [f"{location.uri}: {len(empty)} classes have no test image: {names}"] if empty else []
    rows = {name: limited(part, config.limit) for name, part in rows.items()}
    channels = config.channels or 3
    resolution = config.resolution or _first_resolution(location, rows, channels, config.max_pixels)
    splits = {name: _folder_split(location, part, resolution, channels, config) for name, part in rows.items()}
    return Images(channels, resolution, layout.classes, splits, (*layout.notes, *untested))


def _folder_rows(entries: list[Entry], classes: list[str], depth: int) -> Rows:
    number = {name: label for label, name in enumerate(classes)}
    labels = np.array([number[shown(entry.key.split("/")[depth])] for entry in entries], np.int32)
    return Rows([shown(e.key) for e in entries], labels, [e.token for e in entries], [e.key for e in entries])


def _first_resolution(location: Location, rows: dict[str, Rows], channels: int, max_pixels: int) -> int:
    """Return the resolution of the first readable image, which the others must share."""
    for key in (key for part in rows.values() for key in part.origins):
        try:
            width, height = decode(location.read(key), channels, max_pixels).size
        except TransientError:
            raise  # else the resolution would depend on the network's mood
        except (BadImage, StorageError):
            continue
        if width != height:
            raise StorageError(
                f"{location.uri}/{shown(key)}: {width}x{height} pixels, not square; set images.resolution"
            )
        return width
    raise StorageError(f"{location.uri}: not one image there is readable; look at the files")


def _folder_split(location: Location, rows: Rows, resolution: int, channels: int, config: "ImagesConfig") -> ImageSplit:
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
            return Picture(seen(image, resolution, views), "", sha256, token)
        except (BadImage, StorageError) as error:
            if isinstance(error, StorageError) and may_pass(location, error):
                raise  # the whole location does not answer: that makes no image bad
            return Picture(None, str(error), sha256, token)

    return ImageSplit(rows.keys, rows.labels, rows.tokens, (resolution, resolution, channels), read_row, READ_THREADS)
