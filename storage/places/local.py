"""A local folder as a location: every object is either whole or absent, and durable once the call returns."""

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from functa.storage.errors import DamagedObject, MissingObject, StorageError, TransientError
from functa.storage.places.location import PARTIAL, Entry, Location, check_length, checked_key
from functa.storage.places.placing import place

MOST_LINKS = 4  # to folders, inside each other

MAY_PASS = (errno.EIO, errno.ETIMEDOUT, errno.ESTALE)  # reported by a network file system whose server went away


@dataclass(frozen=True)
class LocalLocation(Location):
    """A folder of this machine."""

    def read(self, key: str, limit: int | None = None) -> bytes:
        with self._translated(key), open(self._path(key), "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise DamagedObject(f"{self.uri}/{key}: is not a file; remove it")
            check_length(status.st_size, limit, f"{self.uri}/{key}")
            data = file.read()
        if len(data) < status.st_size:
            raise TransientError(f"{self.uri}/{key}: {len(data)} of its {status.st_size} bytes were read; try again")
        return data

    def read_part(self, key: str, start: int, length: int) -> bytes:
        with self._translated(key), open(self._path(key), "rb", opener=_open_at_once) as file:
            file.seek(start)
            return file.read(length)

    def write(self, key: str, data: bytes) -> None:
        with self._translated(key):
            place(self._writable_path(key), data, replace=True)

    def create(self, key: str, data: bytes) -> bool:
        with self._translated(key):
            return place(self._writable_path(key), data, replace=False)

    def entry(self, key: str) -> Entry | None:
        with self._translated(key):
            try:
                status = self._path(key).stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
            return _entry(key, status) if stat.S_ISREG(status.st_mode) else None  # as on S3, which has no folders

    def entries(self, prefix: str = "") -> list[Entry]:
        folder, _, beginning = prefix.rpartition("/")
        start = self._path(folder) if folder else Path(self.uri)
        with self._translated(folder):
            found = [
                _entry(key, status)
                for key, status in _walk(start, f"{folder}/" if folder else "", beginning)
                if not key.endswith(PARTIAL)
            ]
        return sorted(found, key=lambda entry: entry.key)

    def leftovers(self) -> list[Entry]:
        with self._translated(""):
            walked = _walk(Path(self.uri), "")
            return [_entry(key, status) for key, status in walked if key.endswith(PARTIAL)]

    def delete(self, key: str) -> None:
        with self._translated(key), suppress(FileNotFoundError):
            self._writable_path(key).unlink()

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        with self._translated(key):
            folder = self._writable_path(f"{key}/x").parent
            folder.mkdir(parents=True, exist_ok=True)
            held = os.open(folder, os.O_RDONLY)
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(held, fcntl.LOCK_EX)
            yield
        finally:
            os.close(held)

    def free_bytes(self) -> int | None:
        with self._translated(""):
            return shutil.disk_usage(self.uri).free

    def _path(self, key: str) -> Path:
        return Path(self.uri, checked_key(key))

    def _writable_path(self, key: str) -> Path:
        """Return the path. Raises StorageError if a link leads out of the folder: no store may redirect our writes."""
        path = self._path(key)
        root = os.path.realpath(self.uri)
        if os.path.commonpath([root, os.path.realpath(path.parent)]) != root:
            raise StorageError(f"{path}: a symbolic link leads out of {self.uri}; remove the link")
        return path

    @contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        name = f"{self.uri}/{key}" if key else self.uri
        try:
            yield
        except FileNotFoundError:
            raise MissingObject(f"{name}: is missing") from None
        except OSError as error:
            kind = TransientError if error.errno in MAY_PASS else StorageError
            raise kind(f"{name}: {error.strerror or error}; {_fix(error)}") from error


def may_pass(location: Location, error: StorageError) -> bool:
    """Return whether the location did not answer, which shows nothing about the object.

    A local disk's I/O error is most often of that file alone, and stays.
    """
    cause = error.__cause__
    sick = isinstance(location, LocalLocation) and isinstance(cause, OSError) and cause.errno == errno.EIO
    return isinstance(error, TransientError) and not sick


def _open_at_once(path: str, flags: int) -> int:
    """A pipe that somebody put in a file's place must not hold its reader for ever."""
    return os.open(path, flags | os.O_NONBLOCK)


def _entry(key: str, status: os.stat_result) -> Entry:
    return Entry(key, status.st_size, f"{status.st_size}-{status.st_mtime_ns}", status.st_mtime)


def _fix(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space, then run the same command again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "give this user the right to it, or choose another location"
    if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
        return "a file is in the way of a folder, or the reverse: move it or choose another location"
    if error.errno == errno.ELOOP:
        return "take links out that lead to each other"
    return "look at the disk, or choose another location"


def _walk(
    folder: Path, prefix: str, beginning: str = "", above: frozenset[tuple[int, int]] = frozenset(), links: int = 0
) -> Iterator[tuple[str, os.stat_result]]:
    """Files below a folder, links followed (image sets are often made of them); a link to a folder above is not.

    Of the folder itself only what begins with `beginning`: the rest is not even entered. `above` are the folders on the
    way to it, `links` how many of these were links. Raises OSError where links lead through too many of them: folders
    that link to each other have more paths than can be listed.
    """
    try:
        status = folder.stat()
    except FileNotFoundError:
        return
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    if links > MOST_LINKS:
        raise OSError(errno.ELOOP, f"more than {MOST_LINKS} links to folders inside each other", str(folder))
    for item in os.scandir(folder):
        if not item.name.startswith(beginning):
            continue
        found = _status(item)
        if found is None:
            continue
        if stat.S_ISDIR(found.st_mode):
            further = links + item.is_symlink()
            yield from _walk(Path(item.path), f"{prefix}{item.name}/", "", above | {here}, further)
        else:
            yield prefix + item.name, found


def _status(item: "os.DirEntry[str]") -> os.stat_result | None:
    """Return the status of a link's target; None if it is broken, circular or removed since the listing."""
    try:
        return item.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise
