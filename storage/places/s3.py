"""A prefix of an S3 bucket as a location. One PUT is one object; create-only is If-None-Match.

s3fs writes; botocore and obstore, in the calling thread, read and list.

Retries are our own: bounded, alike for every operation, and distinguished from faults that would come again.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from itertools import groupby
from typing import Any, TypeVar

from functa.storage.errors import MissingObject, StorageError, TransientError
from functa.storage.places import s3_faults
from functa.storage.places.location import (
    PARTIAL,
    Entry,
    Listing,
    ListingPacking,
    Location,
    check_length,
    checked_key,
    refuse_fork,
)
from functa.storage.places.s3_fast import Header, Span
from functa.storage.places.s3_reading import Page, Reader, reader_like
from functa.storage.places.s3_retries import TRIES, retried

Answer = TypeVar("Answer")

ONE_PUT = 5 << 30  # bytes; S3 takes no more at once

HIDDEN = ("/", PARTIAL)  # endings of keys that listings leave out: marks of folders, and temporary names


@dataclass(frozen=True)
class S3Location(Location):
    """A prefix of an S3 bucket; endpoint, region and credentials come from the environment, as for any AWS tool.

    Belongs to the process that made it: a forked child that used it would wait for ever for threads that it has not.
    """

    requests = 32

    tries: int = field(default=TRIES, compare=False, repr=False)
    sleep: Callable[[float], None] = field(default=time.sleep, compare=False, repr=False)
    process: int = field(default_factory=os.getpid, compare=False, repr=False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle, as a spawned child does: the location belongs to this process."""
        self.__dict__.update(state | {"process": os.getpid()})

    def read(self, key: str, limit: int | None = None) -> bytes:
        data = self.read_part(key, 0, limit + 1) if limit is not None else self._get(key)[1]
        check_length(len(data), limit, f"{self.uri}/{key}")
        return data

    def read_part(self, key: str, start: int, length: int) -> bytes:
        return self._get(key, span=(start, start + length))[1] if length > 0 else b""

    def versioned(self, key: str, limit: int | None = None) -> tuple[Entry, bytes] | None:
        with suppress(MissingObject):
            header, data = self._get(key, limit, fast=True)
            return _listed(key, header), data
        return None

    def versioned_part(self, key: str, start: int, length: int) -> tuple[Entry, bytes] | None:
        with suppress(MissingObject):
            header, data = self._get(key, span=(start, start + length), fast=True) if length > 0 else ({}, b"")
            if header:
                return _listed(key, header), data
        return super().versioned_part(key, start, length)  # no byte lies there

    def _get(
        self, key: str, limit: int | None = None, span: Span | None = None, fast: bool = False
    ) -> tuple[Header, bytes]:
        first = iter([fast])

        def get() -> tuple[Header, bytes]:
            reader, bucket_and_key = self._reader(), self._parts(key)
            found = reader.fast.get(*bucket_and_key, limit, span) if next(first, False) else None
            return found or reader.get(*bucket_and_key, limit, span)

        return self._tried(key, get)

    def write(self, key: str, data: bytes) -> None:
        self._tried(key, lambda: self._put(key, data))

    def create(self, key: str, data: bytes) -> bool:
        def put() -> bool:
            try:
                self._put(key, data, mode="create")
                return True
            except OSError as error:
                # FileExistsError of some servers; Ceph's gateway answers a lost create with a bare EINVAL.
                if not isinstance(error, FileExistsError) and s3_faults.code(error) != "PreconditionFailed":
                    raise
            # A try whose answer was lost may have made it, ours or one that aiohttp repeated without a word.
            standing = self._entry(key)
            same_size = standing is not None and standing.size == len(data)
            return same_size and self._reader().get(*self._parts(key))[1] == data

        return self._tried(key, put)

    def entry(self, key: str) -> Entry | None:
        return self._tried(key, lambda: self._entry(key))

    def entries(self, prefix: str = "") -> list[Entry]:
        found = [
            Entry(key, size, etag, datetime.fromisoformat(when).timestamp() if when else float("inf"))
            for page in self._pages(prefix)
            for key, etag, size, when in page
        ]
        return sorted(found, key=lambda entry: entry.key)

    def listing(self, prefix: str = "") -> Listing:
        packing, last = ListingPacking(), ""
        for page in self._pages(prefix):
            keys = [last, *(row[0] for row in page)]
            if keys != sorted(keys):  # as in directory buckets
                return super().listing(prefix)
            last = keys[-1]
            for folder, files in groupby(page, lambda row: row[0][: row[0].rfind("/") + 1]):
                names, etags, *_ = zip(*files, strict=True)
                packing.add(folder, [name[len(folder) :] for name in names], list(etags))
        return packing.packed()

    def _pages(self, prefix: str) -> Iterator[list[tuple[str, str, int, str]]]:
        """Yield key, etag, size and time of what is listed, page by page, each of which is tried again by itself."""
        bucket, _, above = f"{self.uri.removeprefix('s3://').rstrip('/')}/".partition("/")
        token: str | None = None
        while True:
            ask = partial(self._page, bucket, above + prefix, token)
            page = self._tried(prefix.rpartition("/")[0], ask)
            rows = zip(page.keys, page.etags, page.sizes, page.modified, strict=True)
            yield [(row[0].removeprefix(above), *row[1:]) for row in rows if not row[0].endswith(HIDDEN)]
            if (token := page.token) is None:
                return

    def _page(self, bucket: str, prefix: str, token: str | None) -> Page:
        return self._reader().page(bucket, prefix, token)

    def delete(self, key: str) -> None:
        def remove() -> None:
            with suppress(FileNotFoundError):
                self._fs().rm_file(self._path(key))

        self._tried(key, remove)

    def preflight_write(self, needed_bytes: int = 0) -> None:
        # A user waits here who has just typed the address: a wrong one should fail within seconds.
        Location.preflight_write(replace(self, tries=min(2, self.tries)), needed_bytes)

    def free_bytes(self) -> int | None:
        return None

    def _path(self, key: str) -> str:
        return f"{self.uri.removeprefix('s3://').rstrip('/')}/{checked_key(key)}"

    def _parts(self, key: str) -> tuple[str, str]:
        bucket, _, path = self._path(key).partition("/")
        return bucket, path

    def _put(self, key: str, data: bytes, **how: Any) -> None:
        # A chunk as long as the object: by parts, create-only would not hold on every server, and a killed writer
        # would leave its parts behind.
        self._fs().pipe_file(self._path(key), data, chunksize=min(ONE_PUT, len(data) + 1), **how)

    def _entry(self, key: str) -> Entry | None:
        bucket, path = self._parts(key)
        try:
            found = self._fs().call_s3("head_object", Bucket=bucket, Key=path)
        except FileNotFoundError:
            return None
        return _listed(key, found)

    def _fs(self) -> Any:
        import fsspec

        refuse_fork(self.process, self.uri)
        if s3_faults.endpoint_with_password():
            raise StorageError(
                f"{self.uri}: AWS_ENDPOINT_URL has a user or password in it, which clients log; "
                "use AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        # Looked up at every use: fsspec keeps one per thread.
        system = fsspec.filesystem("s3", **_s3_options(retries={"total_max_attempts": 1}))
        system.retries = 1
        return system

    def _reader(self) -> Reader:
        refuse_fork(self.process, self.uri)
        return reader_like(self._fs)

    def _tried(self, key: str, act: Callable[[], Answer]) -> Answer:
        def once() -> Answer:
            with self._translated(key):
                return act()

        return retried(once, self.tries, self.sleep)

    @contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        name = f"{self.uri.rstrip('/')}/{key}"
        try:
            yield
        except StorageError:
            raise
        except Exception as error:  # botocore's and aiohttp's families have no common root of their own
            if s3_faults.is_missing(error):
                raise MissingObject(f"{name}: is missing") from None
            kind = TransientError if s3_faults.may_pass(error) else StorageError
            raise kind(f"{name}: {self._fault(error)}") from error

    def _fault(self, error: BaseException) -> str:
        account = s3_faults.account(self._path("x").partition("/")[0])
        if s3_faults.code(error) == "403" and s3_faults.operation(error).startswith("Head"):
            # An answer to a HEAD has no body that gives the reason: ask the same in a request whose answer has one.
            try:
                self._fs().call_s3("list_objects_v2", Bucket=account.bucket, MaxKeys=1)
            except Exception as reason:
                error = reason
        return s3_faults.fault(error, account)


def _listed(key: str, info: Header) -> Entry:
    when = info.get("LastModified") or None
    modified = when.timestamp() if when else float("inf")
    return Entry(key, int(info["ContentLength"]), str(info.get("ETag", "")).strip('"'), modified)


def _s3_options(**config: Any) -> dict[str, Any]:
    return {
        "use_listings_cache": False,  # another process's objects must be seen
        "config_kwargs": {"max_pool_connections": 64, "connect_timeout": 10, "read_timeout": 30} | config,
    }
