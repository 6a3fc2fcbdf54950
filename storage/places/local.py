"""A local folder as a location: every object is either whole or absent, and durable once the call returns."""

import errno
import fcntl
import os
import shutil
import stat
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from functa.storage.errors import DamagedObject, MissingObject, StorageError, TransientError
from functa.storage.places.location import PARTIAL, Entry, Listing, ListingPacking, Location, check_length, checked_key
from functa.storage.places.placing import place
from functa.storage.texts import CHUNK

MOST_LINKS = 4  # to folders, inside each other

MAY_PASS = (errno.EIO, errno.ETIMEDOUT, errno.ESTALE)  # reported by a network file system whose server went away


STATUS_THREADS = 8  # that ask for the status of files

MANY_FILES = 256  # in a run: of fewer, waking a thread takes longer than asking

_Names = tuple[str, list[str], int]  # prefix of a folder, names of files in it, its handle

_Found = tuple[list[str], list[os.stat_result]]  # names of files, status of each

_Files = tuple[str, list[str], list[os.stat_result]]  # the same behind the prefix of their folder

BROKEN = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # a link that leads nowhere


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
        with self._translated(prefix.rpartition("/")[0]):
            return [
                _entry(f"{folder}{name}", status)
                for folder, names, statuses in self._walked(prefix)
                for name, status in zip(names, statuses, strict=True)
                if not name.endswith(PARTIAL)
            ]

    def listing(self, prefix: str = "") -> Listing:
        packing = ListingPacking()
        with self._translated(prefix.rpartition("/")[0]):
            for folder, names, statuses in self._walked(prefix):
                if PARTIAL in "".join(names):
                    kept = [pair for pair in zip(names, statuses, strict=True) if not pair[0].endswith(PARTIAL)]
                    names, statuses = [name for name, _ in kept], [status for _, status in kept]
                packing.add(folder, names, [f"{of.st_size}-{of.st_mtime_ns}" for of in statuses])
        return packing.packed()

    def _walked(self, prefix: str) -> "Iterator[_Files]":
        folder, _, beginning = prefix.rpartition("/")
        path = self._path(folder) if folder else Path(self.uri)
        return _described(_walk(path, f"{folder}/" if folder else "", beginning))

    def leftovers(self) -> list[Entry]:
        with self._translated(""):
            return [
                _entry(f"{folder}{name}", status)
                for folder, names, statuses in self._walked("")
                for name, status in zip(names, statuses, strict=True)
                if name.endswith(PARTIAL)
            ]

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


@dataclass(frozen=True)
class _Folder:
    """An open folder on a walk: its names that are left, files side by side; and the folders above it."""

    handle: int
    path: str
    prefix: str
    runs: Iterator[list[str]]
    above: frozenset[tuple[int, int]]
    links: int  # that lead to it


def _described(runs: Iterator[_Names]) -> Iterator[_Files]:
    """Yield files with the status of each. Threads ask for those of many files, a few runs ahead.

    The kernel and the servers of network file systems answer several threads at once.
    """
    waiting: deque[tuple[str, Future[_Found]]] = deque()
    with ThreadPoolExecutor(STATUS_THREADS, "status") as pool:
        for prefix, names, handle in runs:
            if len(names) < MANY_FILES:
                answer: Future[_Found] = Future()
                answer.set_result(_statuses(names, handle))
            else:  # the walk closes its own handle
                answer = pool.submit(_statuses_of, names, os.dup(handle))
            waiting.append((prefix, answer))
            if len(waiting) > STATUS_THREADS:
                before, answer = waiting.popleft()
                yield before, *answer.result()
        for before, answer in waiting:
            yield before, *answer.result()


def _walk(folder: Path, prefix: str, beginning: str = "") -> Iterator[_Names]:
    """Yield the files below a folder, in the order of keys, links followed; none leads to a folder above.

    Each run comes with its folder, open until the next one is asked for. Image sets are often made of links. Of the
    folder itself only what begins with `beginning`: the rest is not even entered. Raises OSError where links lead
    through too many of them: folders that link to each other have more paths than can be listed.
    """
    opened = list[_Folder]()

    def enter(path: str, prefix: str, beginning: str, above: frozenset[tuple[int, int]], links: int) -> None:
        try:
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return
        opened.append(_Folder(handle, path, prefix, iter(()), above, links))
        status = os.fstat(handle)
        here = (status.st_dev, status.st_ino)
        if here in above:
            return
        if links > MOST_LINKS:
            raise OSError(errno.ELOOP, f"more than {MOST_LINKS} links to folders inside each other", path)
        opened[-1] = _Folder(handle, path, prefix, _runs(_names(handle, beginning)), above | {here}, links)

    try:
        enter(str(folder), prefix, beginning, frozenset(), 0)
        while opened:
            of = opened[-1]
            names = next(of.runs, None)
            if names is None:
                os.close(opened.pop().handle)
            elif names[0].endswith("/"):
                path = f"{of.path}/{names[0][:-1]}"
                enter(path, of.prefix + names[0], "", of.above, of.links + os.path.islink(path))
            else:
                yield of.prefix, names, of.handle
    finally:
        for each in opened:
            os.close(each.handle)


def _names(handle: int, beginning: str) -> list[str]:
    """Return the names in a folder in the order of keys; those of folders have a slash at their end."""
    try:
        with os.scandir(handle) as items:
            names = [item.name + "/" if item.is_dir() else item.name for item in items]
    except OSError as error:  # of a link that leads nowhere
        if error.errno not in BROKEN:
            raise
        names = [name + "/" if _is_folder(name, handle) else name for name in os.listdir(handle)]
    names = [name for name in names if name.startswith(beginning)] if beginning else names
    names.sort()
    return names


def _is_folder(name: str, handle: int) -> bool:
    found = _statuses([name], handle)[1]
    return bool(found) and stat.S_ISDIR(found[0].st_mode)


def _runs(names: list[str]) -> Iterator[list[str]]:
    """Yield files that follow each other, not too many at once, and each folder alone."""
    start = 0
    folders = [at for at, name in enumerate(names) if name[-1] == "/"]
    for at in (*folders, len(names)):
        for begin in range(start, at, CHUNK):
            yield names[begin : min(begin + CHUNK, at)]
        if at < len(names):
            yield [names[at]]
        start = at + 1


def _statuses_of(names: list[str], handle: int) -> _Found:
    """Return the same as _statuses, and close the folder."""
    try:
        return _statuses(names, handle)
    finally:
        os.close(handle)


def _statuses(names: list[str], handle: int) -> _Found:
    """Return files with the status of each, of a link its target's; without those that are not there any more."""
    try:
        return names, [os.stat(name, dir_fd=handle) for name in names]
    except OSError as error:
        if error.errno not in BROKEN:
            raise
        if len(names) == 1:
            return [], []
        return _joined(_statuses([name], handle) for name in names)


def _joined(
    parts: Iterable[_Found],
) -> _Found:
    whole = list(parts)
    return [name for names, _ in whole for name in names], [status for _, found in whole for status in found]
