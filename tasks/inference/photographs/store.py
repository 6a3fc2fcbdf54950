"""A folder of functasets, one for each size of images: STORE/768x512.zarr holds the images 768 wide and 512 high.

Every functaset is whole in itself: its fingerprint has the size of its images, so that it decodes alone. Free of torch.
"""

import re
from typing import Any, NamedTuple

from functa.storage.errors import StorageError
from functa.storage.functaset.header import read_root
from functa.storage.places.address import open_location
from functa.storage.places.location import Location

ROOT = re.compile(r"([1-9][0-9]{0,5}x[1-9][0-9]{0,5}\.zarr)/zarr\.json")

SPLIT = "train"  # of all rows, so that the functaset has the moments that normalise them


class Size(NamedTuple):
    """Sides of an image in pixels."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def size_of(fingerprint: dict[str, Any]) -> Size | None:
    """Return the size of the images of a functaset, by its fingerprint; None where they are a field's own squares."""
    sides = (fingerprint.get("images.height"), fingerprint.get("images.width"))
    return Size(*sides) if all(isinstance(side, int) for side in sides) else None  # type: ignore[arg-type]


def at_size(store: Location, size: Size) -> Location:
    """Return where the store has, or will have, the images of this size."""
    return store.child(f"{size}.zarr")


def functasets_of_store(uri: str) -> list[str]:
    """Return the URIs of a store's functasets; empty for what is a functaset itself, a root, or none of these.

    Reads nothing of them.
    """
    location = open_location(uri)
    if location.exists("zarr.json") or location.exists("stages/encode.json"):  # a root may hold millions of objects
        return []
    found = [match[1] for key in location.list() if (match := ROOT.fullmatch(key))]
    return [location.child(name).uri for name in found]


def functasets_by_size(uri: str) -> list[str]:
    """Return the URIs of a store's functasets, or of one of them itself; empty for anything else."""
    location = open_location(uri)
    if location.exists("zarr.json"):
        return [location.uri] if size_of(read_root(location).fingerprint) else []
    return functasets_of_store(uri)


def only_functaset(uri: str) -> str:
    """Return the URI of the one functaset that a store has; other URIs as they are. Raises StorageError for several."""
    found = functasets_of_store(uri)
    if len(found) > 1:
        names = ", ".join(each.rpartition("/")[2] for each in found[:4]) + (", ..." if found[4:] else "")
        raise StorageError(f"{uri}: holds {len(found)} functasets, one for each size of images: name one ({names})")
    return found[0] if found else uri
