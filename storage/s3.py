"""A prefix of an S3 bucket as a place, through s3fs. One PUT is one object; create-only is If-None-Match.

Retries are our own: bounded, alike for every operation, and told apart from faults that would come again.
"""

import errno
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from storage.errors import MissingObject, StorageError, TransientError
from storage.places import PARTIAL, Entry, Location, checked_key

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")

TRIES = 5
PATIENCE_SECONDS = 60.0  # no try begins later than this after the first
LONGEST_PAUSE = 8.0

# By class names up the inheritance: botocore and aiohttp have no common root, and need not be loaded to be told apart.
LOST = {"HTTPClientError", "ClientPayloadError", "ClientConnectionError", "IncompleteReadError", "ResponseParserError"}
# 503 and 500, as s3fs translates them, and what a broken socket says.
LOST_ERRNO = {errno.EBUSY, getattr(errno, "EREMOTEIO", errno.EIO), errno.EPIPE, errno.ETIMEDOUT}
LOST_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class S3Location(Location):
    """A prefix of an S3 bucket; endpoint, region and credentials come from the environment, as for any AWS tool."""

    tries: int = field(default=TRIES, compare=False, repr=False)
    sleep: Callable[[float], None] = field(default=time.sleep, compare=False, repr=False)

    def read(self, key: str) -> bytes:
        return self._tried(key, lambda: bytes(self._fs().cat_file(self._path(key))))

    def write(self, key: str, data: bytes) -> None:
        self._tried(key, lambda: self._fs().pipe_file(self._path(key), data))

    def create(self, key: str, data: bytes) -> bool:
        def put() -> bool:
            try:
                self._fs().pipe_file(self._path(key), data, mode="create")
                return True
            except FileExistsError:
                pass
            except OSError as error:
                # Ceph's gateway answers a lost create with a bare EINVAL; any other cause leaves no object.
                if error.errno != errno.EINVAL or self._entry(key) is None:
                    raise
            # A try whose answer was lost may have made it, ours or one that aiohttp repeated without a word.
            standing = self._entry(key)
            same_size = standing is not None and standing.size == len(data)
            return same_size and bytes(self._fs().cat_file(self._path(key))) == data

        return self._tried(key, put)

    def entry(self, key: str) -> Entry | None:
        return self._tried(key, lambda: self._entry(key))

    def entries(self, prefix: str = "") -> list[Entry]:
        folder, _, beginning = prefix.rpartition("/")
        base = f"{self.uri.removeprefix('s3://').rstrip('/')}/"

        def find() -> dict[str, Any]:
            try:
                return dict(self._fs().find(base + folder, detail=True, prefix=beginning))
            except FileNotFoundError:
                return {}

        listed = [
            _listed(path.removeprefix(base), info)
            for path, info in self._tried(folder, find).items()
            if info["type"] == "file" and not path.endswith(("/", PARTIAL))
        ]
        return sorted((e for e in listed if e.key.startswith(prefix)), key=lambda entry: entry.key)

    def delete(self, key: str) -> None:
        def remove() -> None:
            with suppress(FileNotFoundError):
                self._fs().rm_file(self._path(key))

        self._tried(key, remove)

    def preflight_write(self, needed_bytes: int = 0) -> None:
        # Who waits here has just typed the address: a wrong one should say so within seconds.
        Location.preflight_write(replace(self, tries=min(2, self.tries)), needed_bytes)

    def zarr_store(self, read_only: bool = False) -> Any:
        from zarr.storage import FsspecStore

        return FsspecStore.from_url(self.uri, storage_options=_s3_options(), read_only=read_only)

    def free_bytes(self) -> int | None:
        return None

    def _path(self, key: str) -> str:
        return f"{self.uri.removeprefix('s3://').rstrip('/')}/{checked_key(key)}"

    def _entry(self, key: str) -> Entry | None:
        try:
            return _listed(key, self._fs().info(self._path(key)))
        except FileNotFoundError:
            return None

    def _fs(self) -> Any:
        import fsspec

        # Looked up at every use: fsspec keeps one per process and thread, and one used across a fork hangs.
        system = fsspec.filesystem("s3", **_s3_options(retries={"total_max_attempts": 1}))
        system.retries = 1
        return system

    def _tried(self, key: str, act: Callable[[], Answer]) -> Answer:
        """What `act` answers, tried again while its fault may pass."""
        begun, tried = time.monotonic(), 0
        while True:
            try:
                with self._told(key):
                    return act()
            except TransientError as error:
                tried += 1
                if tried >= self.tries or time.monotonic() - begun > PATIENCE_SECONDS:
                    raise
                log.info("try %d of %d: %s", tried, self.tries, error)
            # Apart from one another, so that workers thrown out together do not come back together.
            self.sleep(min(LONGEST_PAUSE, 2.0 ** (tried - 1)) * random.SystemRandom().uniform(0.5, 1.0))

    @contextmanager
    def _told(self, key: str) -> Iterator[None]:
        name = f"{self.uri.rstrip('/')}/{key}"
        try:
            yield
        except StorageError:
            raise
        except FileNotFoundError:
            raise MissingObject(f"{name}: is missing; check bucket and key") from None
        except Exception as error:  # botocore's and aiohttp's families have no common root of their own
            endpoint = os.environ.get("AWS_ENDPOINT_URL", "the AWS default")
            kind = TransientError if _may_pass(error) else StorageError
            raise kind(
                f"{name}: {type(error).__name__}: {error}; check bucket, credentials and endpoint ({endpoint})"
            ) from error


def _listed(key: str, info: dict[str, Any]) -> Entry:
    when = info.get("LastModified") or None
    modified = when.timestamp() if when else float("inf")
    return Entry(key, int(info["size"]), str(info.get("ETag", "")).strip('"'), modified)


def _may_pass(error: BaseException) -> bool:
    """Whether the fault is of the connection or the server's moment, not of what was asked."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore's ClientError: the server answered
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode") in LOST_STATUS
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    names = {kind.__name__ for kind in type(error).__mro__}
    if "SSLError" in names:  # a certificate that does not hold will not hold in a second
        return False
    return bool(names & LOST) or (isinstance(error, OSError) and error.errno in LOST_ERRNO)


def _s3_options(**config: Any) -> dict[str, Any]:
    return {
        "use_listings_cache": False,  # another process's objects must be seen
        "config_kwargs": {"max_pool_connections": 64, "connect_timeout": 10, "read_timeout": 30} | config,
    }
