"""The interface of every location of bytes, a local folder or a bucket's prefix."""

import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import ClassVar

import numpy as np

from functa.storage.errors import DamagedObject, StorageError
from functa.storage.texts import Packing, Texts

PARTIAL = ".partial"  # ending of temporary names; a killed writer leaves one behind, and nobody reads it


@dataclass(frozen=True)
class Entry:
    """A listed object: key, bytes, and a cheap token that changes when its content does (size and time, or etag).

    modified: when it was last written, in seconds since 1970; infinite where that is not known.
    """

    key: str
    size: int
    token: str
    modified: float = float("inf")


@dataclass(frozen=True)
class Listing:
    """Keys and tokens of many objects, sorted by key, without an Entry for each.

    folders: the prefix ("" or "a/b/") of each run of keys that lie in the same folder; counts int64: of each run. A
    folder has several runs where others lie between its files.
    """

    keys: Texts
    tokens: Texts
    folders: list[str]
    counts: np.ndarray

    def take(self, rows: np.ndarray) -> "Listing":
        """Return these rows, in rising order."""
        run = np.repeat(np.arange(len(self.counts)), self.counts)[rows]
        counts = np.bincount(run, minlength=len(self.counts))
        return Listing(self.keys.take(rows), self.tokens.take(rows), self.folders, counts)


class ListingPacking:
    """Makes a Listing of runs of keys in one folder, in order."""

    def __init__(self) -> None:
        self._keys, self._tokens = Packing(), Packing()
        self._folders, self._counts = list[str](), list[int]()

    def add(self, folder: str, names: list[str], tokens: list[str]) -> None:
        """Append files of a folder, whose prefix is `folder`."""
        self._keys.add(names, folder)
        self._tokens.add(tokens)
        self._folders.append(folder)
        self._counts.append(len(names))

    def packed(self) -> Listing:
        """Return all files that were added; nothing is kept here."""
        keys, tokens = self._keys.packed(), self._tokens.packed()
        return Listing(keys, tokens, self._folders, np.array(self._counts, np.int64))


@dataclass(frozen=True)
class Location(ABC):
    """A folder or bucket prefix. Keys are relative, with '/' between parts; '..' and absolute ones are refused.

    All methods raise StorageError in one line; MissingObject where an object to be read is not there, TransientError
    where the same call may succeed later.
    """

    requests: ClassVar[int] = 1  # how many it answers in the time of one

    uri: str

    def child(self, *parts: str) -> "Location":
        """Return the location below this one."""
        return replace(self, uri=f"{self.uri.rstrip('/')}/{checked_key('/'.join(parts))}")

    @abstractmethod
    def read(self, key: str, limit: int | None = None) -> bytes:
        """Return the object's bytes. Raises DamagedObject, without taking their memory, if they exceed `limit`."""

    def read_part(self, key: str, start: int, length: int) -> bytes:
        """Return `length` bytes from byte `start` on; fewer where the object ends before that."""
        return self.read(key)[start : start + length]

    def versioned(self, key: str, limit: int | None = None) -> tuple[Entry, bytes] | None:
        """Return an object's entry with its bytes, which are left out if there are more than `limit`.

        None where there is no such object.
        """
        entry = self.entry(key)
        if entry is None:
            return None
        return entry, b"" if limit is not None and entry.size > limit else self.read(key)

    def versioned_part(self, key: str, start: int, length: int) -> tuple[Entry, bytes] | None:
        """Return an object's entry with `length` of its bytes from `start` on, None where there is no such object."""
        entry = self.entry(key)
        return None if entry is None else (entry, self.read_part(key, start, length))

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Put an object, replacing one of that name."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Put an object unless one of that name exists: True if this call made it, False (nothing changed) if not.

        On S3, where an answer may be lost, True whenever the existing object has these very bytes.
        """

    @abstractmethod
    def entry(self, key: str) -> Entry | None:
        """Return the object's entry as a listing would show it now, None if there is no such object."""

    @abstractmethod
    def entries(self, prefix: str = "") -> list[Entry]:
        """Objects whose key starts with `prefix`, sorted by key; temporary ones are left out.

        Costs what lies below `prefix`, whether or not it ends in '/'.
        """

    def listing(self, prefix: str = "") -> Listing:
        """Return keys and tokens of the same objects, in little memory."""
        packing = ListingPacking()
        for folder, files in groupby(self.entries(prefix), lambda entry: entry.key[: entry.key.rfind("/") + 1]):
            entries = list(files)
            packing.add(folder, [entry.key[len(folder) :] for entry in entries], [entry.token for entry in entries])
        return packing.packed()

    def leftovers(self) -> list[Entry]:
        """Temporary objects that killed writers left behind, and those of writers at work."""
        return []

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove one object; nothing happens where there is none."""

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Return the free space in bytes, None where it is not limited."""

    def size(self, key: str) -> int | None:
        """Return the object's size in bytes, None if there is no such object."""
        entry = self.entry(key)
        return entry.size if entry else None

    def exists(self, key: str) -> bool:
        """Return whether the object exists."""
        return self.entry(key) is not None

    def list(self, prefix: str = "") -> list[str]:
        """Return the keys that start with `prefix`, sorted."""
        return [entry.key for entry in self.entries(prefix)]

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Let one process at a time pass, for what must read and then write; S3 has no such lock, so all pass there."""
        checked_key(key)
        yield

    def preflight_write(self, needed_bytes: int = 0) -> None:
        """Try a write before the work begins: one clear line for what would otherwise fail an hour in."""
        probe = f".probe.{uuid.uuid4().hex}{PARTIAL}"
        try:
            self.create(probe, b"probe")
            self.delete(probe)
        except StorageError as error:
            why = str(error).replace(f"/{probe}", "")
            raise type(error)(f"cannot write to {why}") from None
        free = self.free_bytes()
        if free is not None and free < needed_bytes:
            raise StorageError(
                f"{self.uri}: {needed_bytes / 1e6:.1f} MB are needed and {free / 1e6:.1f} MB are free; "
                "free some space or choose another location"
            )


def checked_key(key: str) -> str:
    """Return the key if it is relative and stays inside the location. Raises StorageError."""
    if not key or "\0" in key or any(part in ("", ".", "..") for part in key.split("/")):
        raise StorageError(f"'{key}': not a relative key of plain names")
    return key


def check_length(size: int, limit: int | None, name: str) -> None:
    """Raises DamagedObject for more bytes than `limit`."""
    if limit is not None and size > limit:
        raise DamagedObject(f"{name}: has more than {limit} bytes; restore it from a copy")


def refuse_fork(opened_in: int, name: str) -> None:
    """Raises StorageError in any other process than the one that opened `name`."""
    if os.getpid() != opened_in:
        raise StorageError(
            f"{name}: was opened in process {opened_in} and is used in its fork {os.getpid()}; start workers afresh: "
            "DataLoader(..., multiprocessing_context='spawn'), or num_workers=0"
        )
