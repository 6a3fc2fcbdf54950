"""Images that lie as encoded bytes (PNG, JPEG, ...) somewhere: files, members of tars, cells of tables."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from functa.storage.errors import StorageError, TransientError
from functa.storage.images.files import BadImage, decode, read_image
from functa.storage.images.layout import SPLITS, named
from functa.storage.images.rows import Rows, limited, split_rows
from functa.storage.images.source import Images, ImageSplit, Picture, SplitOfKeys, View, seen
from functa.storage.places.local import may_pass
from functa.storage.places.location import Location

if TYPE_CHECKING:
    from functa.storage.config import ImagesConfig


@dataclass(frozen=True)
class Original:
    """An image's bytes as they were read, and their version token."""

    data: bytes
    token: str


Fetch = Callable[[str], Original]  # of an origin; raises BadImage where it cannot be read, StorageError


def encoded_images(
    config: "ImagesConfig",
    location: Location,
    rows: dict[str, Rows],
    classes: list[str],
    fetch: Fetch,
    notes: Sequence[str] = (),
) -> Images:
    """Return the images of a source's rows, "train" and "test" or "all" to be split, whose origins `fetch` reads.

    Raises StorageError where "all" cannot be split, or where images.resolution is not set and the first readable image
    is not square.
    """
    if "all" in rows:
        rows = dict(zip(SPLITS, split_rows(rows["all"], config)))
    notes = (*notes, *(f"{location.uri}: {note}" for note in _in_one_split(rows, classes)))
    rows = {name: limited(part, config.limit) for name, part in rows.items()}
    channels = config.channels or 3
    resolution = config.resolution or _first_resolution(location, rows, channels, config.max_pixels, fetch)
    splits = {
        name: _split(location, part, (resolution, resolution, channels), config, fetch) for name, part in rows.items()
    }
    return Images(channels, resolution, classes, splits, notes)


def _in_one_split(rows: dict[str, Rows], classes: list[str]) -> list[str]:
    """Describe the classes that one split has and the other has not."""
    if not classes:
        return []
    train, test = (rows[split].labels for split in SPLITS)
    unseen, untested = ([classes[label] for label in np.setdiff1d(*of)] for of in ((test, train), (train, test)))
    notes = []
    if unseen:
        notes.append(f"no model can know {named(unseen)}: test has such images, and train has none")
    if untested:
        notes.append(f"{len(untested)} classes have no test image: {named(untested)}")
    return notes


def encoded_by_key(
    config: "ImagesConfig", location: Location, shape: tuple[int, int, int], fetch: Fetch
) -> SplitOfKeys:
    """Return the function from keys to a split of these images, which `fetch` reads by their keys."""

    def of_keys(keys: Sequence[str]) -> ImageSplit:
        rows = Rows(list(keys), np.zeros(len(keys), np.int32), [""] * len(keys), list(keys))
        return _split(location, rows, shape, config, fetch)

    return of_keys


def _first_resolution(location: Location, rows: dict[str, Rows], channels: int, max_pixels: int, fetch: Fetch) -> int:
    """Return the resolution of the first readable image, which the others must share."""
    for key, origin in ((key, origin) for part in rows.values() for key, origin in zip(part.keys, part.origins)):
        try:
            width, height = decode(fetch(origin).data, channels, max_pixels).size
        except TransientError:
            raise  # else the resolution would depend on the network's mood
        except (BadImage, StorageError):
            continue
        if width != height:
            raise StorageError(f"{location.uri}/{key}: {width}x{height} pixels, not square; set images.resolution")
        return width
    raise StorageError(f"{location.uri}: not one image there is readable; look at the files")


def _split(
    location: Location, rows: Rows, shape: tuple[int, int, int], config: "ImagesConfig", fetch: Fetch
) -> ImageSplit:
    resolution, _, channels = shape

    def read_row(row: int, views: Sequence[View | None] = (None,)) -> Picture:
        sha256, token = bytes(32), ""
        try:
            original = fetch(rows.origins[row])
            sha256, token = hashlib.sha256(original.data).digest(), original.token
            image = read_image(original.data, channels, config.max_pixels, config.decoder)
            if config.resolution is None and image.size != (resolution, resolution):
                width, height = image.size
                raise BadImage(
                    f"{width}x{height} pixels where the first image has {resolution}x{resolution}; "
                    "set images.resolution"
                )
            return Picture(seen(image, resolution, views), "", sha256, token)
        except (BadImage, StorageError) as error:
            if isinstance(error, StorageError) and may_pass(location, error):
                raise  # the whole location does not answer: that makes no image bad
            return Picture(None, str(error), sha256, token or getattr(error, "token", ""))

    return ImageSplit(rows.keys, rows.labels, rows.tokens, shape, read_row)
