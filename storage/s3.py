"""A prefix of an S3 bucket as a place, through s3fs. One PUT is one object; create-only is If-None-Match."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from storage.errors import MissingObject, StorageError
from storage.places import PARTIAL, Entry, Location, checked_key


@dataclass(frozen=True)
class S3Location(Location):
    """A prefix of an S3 bucket; endpoint, region and credentials come from the environment, as for any AWS tool."""

    def read(self, key: str) -> bytes:
        with self._told(key):
            return bytes(self._fs().cat_file(self._path(key)))

    def write(self, key: str, data: bytes) -> None:
        with self._told(key):
            self._fs().pipe_file(self._path(key), data)

    def create(self, key: str, data: bytes) -> bool:
        with self._told(key):
            try:
                self._fs().pipe_file(self._path(key), data, mode="create")
                return True
            except FileExistsError:
                return False
            except OSError as error:
                # Ceph's gateway answers a lost create with a bare EINVAL; any other cause leaves no object.
                if error.errno == errno.EINVAL and self.exists(key):
                    return False
                raise

    def size(self, key: str) -> int | None:
        with self._told(key):
            try:
                return int(self._fs().info(self._path(key))["size"])
            except FileNotFoundError:
                return None

    def entries(self, prefix: str = "") -> list[Entry]:
        folder = prefix.rpartition("/")[0]
        base = f"{self.uri.removeprefix('s3://').rstrip('/')}/"
        with self._told(folder):
            try:
                found = self._fs().find(base + folder, detail=True)
            except FileNotFoundError:
                return []
        listed = [
            Entry(path.removeprefix(base), int(info["size"]), str(info.get("ETag", "")).strip('"'))
            for path, info in found.items()
            if info["type"] == "file" and not path.endswith(("/", PARTIAL))
        ]
        return sorted((e for e in listed if e.key.startswith(prefix)), key=lambda entry: entry.key)

    def delete(self, key: str) -> None:
        with self._told(key), suppress(FileNotFoundError):
            self._fs().rm_file(self._path(key))

    def zarr_store(self, read_only: bool = False) -> Any:
        from zarr.storage import FsspecStore

        return FsspecStore.from_url(self.uri, storage_options=_s3_options(), read_only=read_only)

    def free_bytes(self) -> int | None:
        return None

    def _path(self, key: str) -> str:
        return f"{self.uri.removeprefix('s3://').rstrip('/')}/{checked_key(key)}"

    def _fs(self) -> Any:
        import fsspec

        # Looked up at every use: fsspec keeps one per process and thread, and one used across a fork hangs.
        return fsspec.filesystem("s3", **_s3_options())

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
            raise StorageError(
                f"{name}: {type(error).__name__}: {error}; check bucket, credentials and endpoint ({endpoint})"
            ) from error


def _s3_options() -> dict[str, Any]:
    return {
        "use_listings_cache": False,  # another process's objects must be seen
        "config_kwargs": {"max_pool_connections": 64, "connect_timeout": 10, "read_timeout": 60},
    }
