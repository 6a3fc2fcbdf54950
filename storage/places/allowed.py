"""Locations that a process may read and write, where somebody else chooses them: the workers of a server."""

import csv
import os
from collections.abc import Iterable
from pathlib import Path

from functa.storage.errors import StorageError

ALLOWED_ROOTS = "FUNCTA_ALLOWED_ROOTS"  # environment variable: locations between commas, quoted as in CSV


class LocationNotAllowed(StorageError):
    """A location outside those that the operator of this worker allows."""


def check_allowed(uri: str) -> None:
    """Raise LocationNotAllowed if the operator has named locations and this one is in none of them."""
    if not (listed := os.environ.get(ALLOWED_ROOTS)):
        return
    places, parts = read_places(listed), _parts(uri)
    if not any(parts[: len(each)] == each for each in map(_parts, places)):
        raise LocationNotAllowed(
            f"{uri}: is in none of the locations that {ALLOWED_ROOTS} of this worker allows ({', '.join(places)}); "
            f"choose a location in one of them, or start the worker (`functa up`) with this one added to the variable"
        )


def read_places(listed: str) -> list[str]:
    """Return the locations of the variable's value."""
    return [place.strip() for place in next(csv.reader([listed], skipinitialspace=True)) if place.strip()]


def joined_places(places: Iterable[str]) -> str:
    """Return the variable's value for these locations; one with a comma is quoted."""
    return ",".join(f'"{place}"' if "," in place else place for place in places)


def _parts(uri: str) -> tuple[str, ...]:
    """Return what the location consists of, after links and '..'; 's3://a/b' is not in 's3://a/bc'."""
    if "://" in uri and not uri.startswith("file://"):
        kind, _, rest = uri.partition("://")
        return (kind, *(part for part in rest.split("/") if part))
    return Path(os.path.realpath(os.path.expanduser(uri.removeprefix("file://")))).parts
