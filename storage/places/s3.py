"""A prefix of an S3 bucket as a location, through s3fs. One PUT is one object; create-only is If-None-Match.

Retries are our own: bounded, alike for every operation, and distinguished from faults that would come again.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from functa.storage.errors import MissingObject, StorageError, TransientError
from functa.storage.places import s3_faults
from functa.storage.places.location import PARTIAL, Entry, Location, check_length, checked_key, refuse_fork
from functa.storage.places.s3_retries import TRIES, retried

Answer = TypeVar("Answer")

ONE_PUT = 5 << 30  # bytes; S3 takes no more at once


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
        end = None if limit is None else limit + 1

        # One request. Without these arguments s3fs would ask for the size first, a HEAD for every GET.
        data = self._get(key, {"max_concurrency": 1} if end is None else {"start": 0, "end": end})
        check_length(len(data), limit, f"{self.uri}/{key}")
        return data

    def read_part(self, key: str, start: int, length: int) -> bytes:
        return self._get(key, {"start": start, "end": start + length}) if length > 0 else b""

    def _get(self, key: str, how: dict[str, Any]) -> bytes:
        def get() -> bytes:
            try:
                return bytes(self._fs().cat_file(self._path(key), **how))
            except OSError as error:
                if s3_faults.code(error) == "InvalidRange":  # no byte lies in a range behind the object's end
                    return b""
                raise

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
            return same_size and bytes(self._fs().cat_file(self._path(key), max_concurrency=1)) == data

        return self._tried(key, put)

    def entry(self, key: str) -> Entry | None:
        return self._tried(key, lambda: self._entry(key))

    def entries(self, prefix: str = "") -> list[Entry]:
        folder, _, beginning = prefix.rpartition("/")
        base = f"{self.uri.removeprefix('s3://').rstrip('/')}/"

        def find() -> dict[str, Any]:
            try:
                return dict(self._fs().find(base + folder, detail=True, prefix=beginning))
            except FileNotFoundError as error:
                if s3_faults.code(error) == "NoSuchBucket":  # which is not an empty one
                    raise
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
        # A user waits here who has just typed the address: a wrong one should fail within seconds.
        Location.preflight_write(replace(self, tries=min(2, self.tries)), needed_bytes)

    def free_bytes(self) -> int | None:
        return None

    def _path(self, key: str) -> str:
        return f"{self.uri.removeprefix('s3://').rstrip('/')}/{checked_key(key)}"

    def _put(self, key: str, data: bytes, **how: Any) -> None:
        # A chunk as long as the object: by parts, create-only would not hold on every server, and a killed writer
        # would leave its parts behind.
        self._fs().pipe_file(self._path(key), data, chunksize=min(ONE_PUT, len(data) + 1), **how)

    def _entry(self, key: str) -> Entry | None:
        bucket, _, path = self._path(key).partition("/")
        try:
            found = self._fs().call_s3("head_object", Bucket=bucket, Key=path)
        except FileNotFoundError:
            return None
        return _listed(key, {"size": found["ContentLength"], **found})

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
            if isinstance(error, FileNotFoundError) and s3_faults.code(error) != "NoSuchBucket":
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


def _listed(key: str, info: dict[str, Any]) -> Entry:
    when = info.get("LastModified") or None
    modified = when.timestamp() if when else float("inf")
    return Entry(key, int(info["size"]), str(info.get("ETag", "")).strip('"'), modified)


def _s3_options(**config: Any) -> dict[str, Any]:
    return {
        "use_listings_cache": False,  # another process's objects must be seen
        "config_kwargs": {"max_pool_connections": 64, "connect_timeout": 10, "read_timeout": 30} | config,
    }
