"""Locations for a test's stores: a folder, or a prefix of a bucket that is used like one."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Prefix:
    """An s3:// address to which parts are added by '/', as to a Path."""

    uri: str

    def __truediv__(self, part: str) -> "Prefix":
        return Prefix(f"{self.uri}/{part}")

    def __str__(self) -> str:
        return self.uri


Home = Path | Prefix


@contextmanager
def new_bucket(environment: dict[str, str]) -> Iterator[str]:
    """The name of an empty bucket; the environment's server and credentials hold inside."""
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
    """fsspec keeps its clients, which read the environment once: none from before, none left."""
    import fsspec

    fsspec.get_filesystem_class("s3").clear_instance_cache()
    try:
        yield
    finally:
        fsspec.get_filesystem_class("s3").clear_instance_cache()
