"""Hydrated fragments: rows as raw C-order files on this machine, beside records of their sha256.

    <folder>/<fragment>-<digest of its receipts>/{z,label,id}.raw    all rows of the fragment, bad ones too
    <folder>/<fragment>-<digest of its receipts>/<shard>.json        HydratedShard, sealed; written when its rows are in

One file an array, so that a batch is one gather. A shard's rows lie at a fixed offset of it and are always the same
bytes, so that two that hydrate at once, or one that was killed, do no harm: rows without a record do not count.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from functa.storage.errors import DamagedObject, MissingObject, StorageError
from functa.storage.functaset.fragment import Fragment
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.records import FORMAT, ObjectRecord, Record, digest, read_record, seal
from functa.storage.functaset.shards.shard import Shard
from functa.storage.places.address import open_location
from functa.storage.places.local import LocalLocation
from functa.storage.places.location import Location
from functa.storage.readers.shards import SplitShards

ARRAYS = ("z", "label", "id")

FOLDER = "FUNCTA_HYDRATED"  # environment variable: the folder of this machine; else $XDG_CACHE_HOME/functa/hydrated

HASH_BYTES = 8 << 20

THREADS = 4  # that read, decompress, hash and write a shard each

FIX = "run `functa store hydrate` again, which rewrites it"


class HydratedShard(Record):
    """Lengths and sha256 of a shard's rows in the raw files, and of the functaset's objects that they come from."""

    format: Literal[1] = FORMAT
    fragment: str
    shard: int = Field(ge=0)
    rows: int = Field(ge=1)
    source: dict[str, ObjectRecord]  # by array: as the shard's receipt has it
    raw: dict[str, ObjectRecord]  # by array: the shard's rows in the raw file


@dataclass(frozen=True)
class HydratedFragment:
    """A fragment's folder of raw files, whether or not they are written yet."""

    folder: Path
    fragment: Fragment

    @classmethod
    def of(cls, folder: str, fragment: Fragment) -> "HydratedFragment":
        """Return the one of a committed fragment: with other receipts, after a repair, it is another folder."""
        receipts = digest([record.sha256 for record in fragment.receipt_records])
        return cls(Path(os.path.abspath(os.path.expanduser(folder)), f"{fragment.id}-{receipts}"), fragment)

    @property
    def location(self) -> Location:
        """The folder as a location."""
        return LocalLocation(str(self.folder))

    def path(self, array: str) -> Path:
        """Return the raw file of an array."""
        return self.folder / f"{array}.raw"

    def row_bytes(self, array: str) -> int:
        """Return the bytes of one row of an array."""
        spec = self.fragment.plan.arrays[array]
        return int(np.prod(spec.shape[1:], dtype=np.int64)) * np.dtype(spec.dtype).itemsize

    def key(self, shard: Shard) -> str:
        """Return the key of the shard's record."""
        return f"{shard.number:06d}.json"

    def has(self, shard: Shard) -> bool:
        """Return whether the shard's record is there."""
        return self.location.exists(self.key(shard))

    def record(self, shard: Shard) -> HydratedShard:
        """Read the shard's record. Raises MissingObject or DamagedObject, also where it is another shard's."""
        name = f"{self.folder}/{self.key(shard)}"
        try:
            record = read_record(self.location, self.key(shard), HydratedShard)
        except MissingObject:
            raise MissingObject(f"{name}: {shard.name} is not hydrated; run `functa store hydrate`") from None
        except DamagedObject as error:
            raise DamagedObject(f"{name}: is not a hydrated shard's record ({error}); delete it, then {FIX}") from None
        placed = (record.fragment, record.shard, record.rows) == (shard.fragment.id, shard.number, shard.size)
        sizes = {array: self.row_bytes(array) * shard.size for array in ARRAYS}
        if (
            not placed
            or record.source != {array: shard.object(array)[1] for array in ARRAYS}
            or {array: raw.bytes for array, raw in record.raw.items()} != sizes
        ):
            raise DamagedObject(f"{name}: is not of {shard.name}; delete it, then {FIX}")
        return record

    def mapped(self, array: str) -> np.ndarray:
        """Map the raw file as bytes [rows, bytes of a row]. Raises MissingObject, DamagedObject (short)."""
        path, width, rows = self.path(array), self.row_bytes(array), self.fragment.plan.rows
        try:
            found = path.stat().st_size
        except FileNotFoundError:
            raise MissingObject(f"{path}: is missing; {FIX}") from None
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror}; look at the disk, or hydrate elsewhere") from None
        if found != rows * width:
            raise DamagedObject(f"{path}: has {found} bytes and should have {rows * width}; {FIX}")
        return np.memmap(path, np.uint8, "r", shape=(rows, width))

    def check(self, shard: Shard, files: dict[str, np.ndarray], record: HydratedShard | None = None) -> None:
        """Check the shard's rows in these arrays' files against its record, which is read if it is not given.

        Raises MissingObject or DamagedObject naming file and shard.
        """
        record = record or self.record(shard)
        for array in files:
            if sha256_of(files[array][shard.first : shard.first + record.rows]) != record.raw[array].sha256:
                raise DamagedObject(f"{self.path(array)}: rows of {shard.name} were altered (sha256); {FIX}")


def sha256_of(rows: np.ndarray) -> str:
    """Return the sha256 of rows [n, ...], a few at a time: the pages of a mapped file need not all be there at once."""
    hashed = hashlib.sha256()
    flat = rows.reshape(-1).view(np.uint8)
    for start in range(0, len(flat), HASH_BYTES):
        hashed.update(flat[start : start + HASH_BYTES].data)
    return hashed.hexdigest()


def default_folder() -> str:
    """Return the folder of hydrated fragments unless another is given: that of the machine, or of the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.environ.get(FOLDER) or os.path.join(cache, "functa", "hydrated")


@dataclass(frozen=True)
class Hydration:
    """The result of a call: the folder, how many shards there are, how many it wrote, and the bytes of these."""

    folder: str
    shards: int
    written: int
    bytes: int


def hydrate(
    functaset: Functaset,
    folder: str | None = None,
    progress: Callable[[int, int, int], None] | None = None,
    split: str | None = None,
) -> Hydration:
    """Write every visible shard's rows of a split, or of all, as raw local files, each object checked by its receipt.

    What exists is checked and kept; what is damaged is written again; a call after an interruption goes on. Called
    before and after each shard: progress(shards done, shards in all, bytes written). Raises StorageError: too little
    space (before anything is written, or when others take it), a damaged object of the functaset, a folder that cannot
    be written to.
    """
    target = default_folder() if folder is None else folder
    if folder is not None:  # of the caller's choice: the operator may not allow it
        open_location(folder)
    inside = LocalLocation(os.path.abspath(os.path.expanduser(target))).uri
    if inside == functaset.location.uri or inside.startswith(f"{functaset.location.uri}/"):
        raise StorageError(f"{target}: lies in the functaset itself; choose another folder")
    every = [
        (HydratedFragment.of(target, fragment), shard)
        for each in (functaset.splits if split is None else [split])
        for fragment, shards in SplitShards(functaset, each).by_fragment()
        for shard in shards
    ]
    with ThreadPoolExecutor(THREADS) as pool, _one_line_errors(target):
        whole = list(pool.map(lambda each: _whole(*each), every))
        left = [each for each, there in zip(every, whole, strict=True) if not there]
        os.makedirs(target, exist_ok=True)
        LocalLocation(inside).preflight_write(sum(_bytes(fragment, shard) for fragment, shard in left))
        written = 0
        waiting = deque(pool.submit(_write, *each) for each in left)
        try:
            for number, (fragment, shard) in enumerate(left):
                if progress:
                    progress(len(every) - len(left) + number, len(every), written)
                waiting.popleft().result()
                written += _bytes(fragment, shard)
        finally:
            pool.shutdown(cancel_futures=True)  # after an error: what is being written is finished, no more is begun
    if progress:
        progress(len(every), len(every), written)
    return Hydration(target, len(every), len(left), written)


def _bytes(fragment: HydratedFragment, shard: Shard) -> int:
    return sum(fragment.row_bytes(array) for array in ARRAYS) * shard.size


def _whole(fragment: HydratedFragment, shard: Shard) -> bool:
    """Return whether the shard's rows are as recorded; delete a record that is wrong."""
    if not fragment.has(shard):
        return False
    try:
        fragment.check(shard, {array: fragment.mapped(array) for array in ARRAYS})
        return True
    except StorageError:
        with suppress(StorageError):  # of rows that are not there
            fragment.location.delete(fragment.key(shard))
        return False


def _write(fragment: HydratedFragment, shard: Shard) -> None:
    raw = {}
    for array in ARRAYS:
        rows = np.ascontiguousarray(shard.array(array))
        _put(fragment.path(array), rows, shard.first * fragment.row_bytes(array), fragment)
        raw[array] = ObjectRecord(bytes=rows.nbytes, sha256=sha256_of(rows))
    record = HydratedShard(
        fragment=shard.fragment.id, shard=shard.number, rows=shard.size,
        source={array: shard.object(array)[1] for array in ARRAYS}, raw=raw,
    )  # fmt: skip
    fragment.location.create(fragment.key(shard), seal(record))


def _put(path: Path, rows: np.ndarray, offset: int, fragment: HydratedFragment) -> None:
    """Write rows at their offset in the fragment's file, durable once the call returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not followed where it is a link: in a folder that others can write to, it could lead anywhere.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        size = fragment.fragment.plan.rows * fragment.row_bytes(path.stem)
        if os.fstat(descriptor).st_size != size:
            os.ftruncate(descriptor, size)
        view = rows.reshape(-1).data.cast("B")
        while view:
            count = os.pwrite(descriptor, view, offset)
            view, offset = view[count:], offset + count
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _one_line_errors(folder: str) -> Iterator[None]:
    """Turn an OSError into a StorageError of one line."""
    try:
        yield
    except OSError as error:
        fix = f"free some space or give this user the right to it, or choose another folder with --to or {FOLDER}"
        raise StorageError(f"{folder}: {error.strerror or error}; {fix}") from error
