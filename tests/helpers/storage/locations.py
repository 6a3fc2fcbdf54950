"""Locations for a test's stores: a folder, or a prefix of a bucket that is used like one."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from functa.storage.places.location import Location
from functa.storage.places.s3_reading import forget_readers


@dataclass(frozen=True)
class Prefix:
    """An s3:// address that is extended with '/', like a Path."""

    uri: str

    def __truediv__(self, part: str) -> "Prefix":
        return Prefix(f"{self.uri}/{part}")

    def __str__(self) -> str:
        return self.uri


Home = Path | Prefix


@contextmanager
def new_bucket(environment: dict[str, str]) -> Iterator[str]:
    """Yield the name of an empty bucket; inside, clients use the environment's server and credentials."""
    import fsspec

    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        with clients_of_this_environment():
            name = f"functa-{uuid.uuid4().hex[:12]}"
            fsspec.filesystem("s3").call_s3("create_bucket", Bucket=name)
            yield name


@contextmanager
def clients_of_this_environment() -> Iterator[None]:
    """Clear the kept clients before and after: each reads the environment only once."""
    import fsspec

    def clear() -> None:
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        forget_readers()

    clear()
    try:
        yield
    finally:
        clear()


def zarr_store(place: Location) -> Any:
    """Return zarr's own store over the location, to read a functaset without this project's code."""
    from zarr.storage import FsspecStore, LocalStore

    if not place.uri.startswith("s3://"):
        return LocalStore(place.uri, read_only=True)
    from functa.storage.places.s3 import _s3_options

    return FsspecStore.from_url(place.uri, storage_options=_s3_options(), read_only=True)
