"""Places by their address: a local folder or a prefix of an S3 bucket, behind the same interface; and JSON in them.

Every write is atomic: an object of that name is either whole or absent. Locally that is a temporary file, fsync and
rename (or link, which fails if the name is taken); on S3 it is one PUT (If-None-Match for create-only). JSON that
readers would refuse for its length is not written.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from functa.storage.errors import DamagedObject, StorageError
from functa.storage.places.allowed import check_allowed
from functa.storage.places.local import LocalLocation
from functa.storage.places.location import Location, checked_key
from functa.storage.places.s3 import S3Location

MAX_JSON_BYTES = 64 << 20  # of an object, for readers and writers alike

MAX_STAGE_BYTES = 1 << 30  # of a stage's record, which lists every bad image, and of a sweep's results


def open_location(uri: str) -> Location:
    """Return the location of a local path, file:///path or s3://bucket/prefix.

    Raises StorageError for anything else, LocationNotAllowed for what the operator of a worker does not allow.
    """
    location = _location(uri)
    check_allowed(location.uri)
    return location


def _location(uri: str) -> Location:
    if uri.startswith("s3://"):
        if not re.fullmatch(r"s3://[A-Za-z0-9][A-Za-z0-9.-]{1,62}(/.*)?", uri):
            raise StorageError("s3 address: expected s3://bucket/prefix, with credentials in the environment")
        bucket, _, prefix = uri.removeprefix("s3://").rstrip("/").partition("/")
        return S3Location(f"s3://{bucket}/{checked_key(prefix)}" if prefix else f"s3://{bucket}")
    if uri.startswith("file://"):
        uri = uri.removeprefix("file://")
        if not uri.startswith("/"):
            raise StorageError(f"file://{uri}: expected file:///absolute/path")
    elif "://" in uri:
        raise StorageError(
            f"{uri.partition('://')[0]}://: unknown kind of location; use a local path, file:// or s3://"
        )
    if not uri or "\0" in uri:
        raise StorageError("the path of a location is empty or not a path; give a local path, file:// or s3://")
    return LocalLocation(str(Path(os.path.abspath(os.path.expanduser(uri)))))


def is_address(text: str) -> bool:
    """Return whether the text is an address of its own, not a path below another location."""
    return "://" in text or text.startswith("/")


def below(location: Location, text: str) -> Location:
    """Return the location that an address names, or a path below this location."""
    return open_location(text) if is_address(text) else location.child(*text.split("/"))


def read_json(location: Location, key: str, limit: int = MAX_JSON_BYTES) -> Any:
    """A JSON object's value. Raises MissingObject, DamagedObject (not JSON, or larger than `limit` bytes)."""
    return parse_json(location.read(key, limit), f"{location.uri}/{key}")


def parse_json(data: bytes, name: str) -> Any:
    """The value of JSON bytes. Raises DamagedObject naming the object."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedObject(f"{name}: not valid JSON ({error}); restore it from a copy") from None


def write_json(location: Location, key: str, value: Any, limit: int = MAX_JSON_BYTES) -> None:
    """Replace a JSON object atomically; non-finite numbers are refused (ValueError), as JSON has none.

    Raises StorageError, before anything is written, for more bytes than `limit`.
    """
    data = (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()
    location.write(key, readable(data, f"{location.uri}/{key}", "choose smaller settings", limit))


def readable(data: bytes, name: str, fix: str, limit: int = MAX_JSON_BYTES) -> bytes:
    """Return JSON bytes that are to be written. Raises StorageError for more of them than readers take."""
    if len(data) > limit:
        raise StorageError(f"{name}: would have {len(data)} bytes of JSON, and readers take {limit} at most; {fix}")
    return data
