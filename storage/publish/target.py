"""Destinations of an export: a folder or bucket, or a repository of a hub. Nothing of others is replaced in either."""

from collections.abc import Iterable, Mapping
from typing import Protocol

from functa.storage.errors import StorageError
from functa.storage.places.location import Location
from functa.storage.publish.manifest import MANIFEST, taken


class Target(Protocol):
    """A destination whose files are put one by one, the manifest and the cards last."""

    address: str

    def put(self, path: str, data: bytes) -> None:
        """Add a file; nothing happens where these very bytes are there already. Raises StorageError: another file."""

    def finish(self, manifest: bytes, cards: Mapping[str, bytes]) -> None:
        """Complete the export; only from now on it can be fetched."""


class FolderTarget:
    """A folder, or a prefix of a bucket, that is empty or holds a part of the same export."""

    def __init__(self, location: Location, paths: Iterable[str]) -> None:
        self.location, self.address = location, location.uri
        location.preflight_write()
        if foreign := {*location.list()} - {*paths, MANIFEST}:
            raise taken(self.address, foreign, "is not of this export")

    def put(self, path: str, data: bytes) -> None:
        if not self.location.create(path, data) and self.location.read(path) != data:
            raise taken(self.address, [path], "has another content")

    def finish(self, manifest: bytes, cards: Mapping[str, bytes]) -> None:
        for path, data in cards.items():
            self.location.create(path, data)  # an existing one may have been edited
        self.put(MANIFEST, manifest)


def check_inside(location: Location, target: Location) -> None:
    """Raise StorageError for a destination inside what is exported."""
    if f"{target.uri}/".startswith(f"{location.uri.rstrip('/')}/"):
        raise StorageError(f"{target.uri}: lies in what is to be exported; choose another location")
