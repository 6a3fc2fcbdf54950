"""Hydrated fragments: rows as raw C-order files on this machine, beside records that vouch for them.

    <folder>/<fragment>-<digest of its receipts>/{z,label,id}.raw    all rows of the fragment, bad ones too
    <folder>/<fragment>-<digest of its receipts>/<shard>.json        HydratedShard, sealed; written when its rows are in

One file an array, so that a batch is one gather. A shard's rows lie at a fixed place of it and are always the same
bytes, so that two who hydrate at once, or one who was killed, do no harm: rows without a record do not count.
"""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from functa.storage.errors import DamagedObject, MissingObject, StorageError
from functa.storage.functaset.fragment import Shard, read_array
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.plan import Plan, array_specs
from functa.storage.functaset.records import FORMAT, ObjectRecord, Record, digest, read_record, seal
from functa.storage.places.address import open_location
from functa.storage.places.local import LocalLocation
from functa.storage.places.location import Location
from functa.storage.readers.shards import SplitShards

ARRAYS = ("z", "label", "id")

HASH_BYTES = 8 << 20

MEND = "run `functa store hydrate` again, which rewrites it"


class HydratedShard(Record):
    """What a shard's rows in the raw files must be, and the objects of the functaset that they come from."""

    format: Literal[1] = FORMAT
    fragment: str
    shard: int = Field(ge=0)
    rows: int = Field(ge=1)
    source: dict[str, ObjectRecord]  # by array: as the shard's receipt has it
    raw: dict[str, ObjectRecord]  # by array: the shard's rows in the raw file


@dataclass(frozen=True)
class HydratedFragment:
    """Where a fragment's raw files are, or will be."""

    folder: Path
    plan: Plan

    @classmethod
    def of(cls, folder: str, shard: Shard) -> "HydratedFragment":
        """Of a shard's fragment as it is committed: with other receipts, after a repair say, it is another place."""
        receipts = digest([receipt.sha256 for receipt in shard.entry.receipts])
        return cls(Path(os.path.abspath(os.path.expanduser(folder)), f"{shard.plan.id}-{receipts}"), shard.plan)

    @property
    def location(self) -> Location:
        """The folder as a place."""
        return LocalLocation(str(self.folder))

    def path(self, array: str) -> Path:
        """The raw file of an array."""
        return self.folder / f"{array}.raw"

    def row_bytes(self, array: str) -> int:
        """Of one row."""
        spec = array_specs(self.plan)[array]
        return int(np.prod(spec.shape[1:], dtype=np.int64)) * np.dtype(spec.dtype).itemsize

    def key(self, shard: Shard) -> str:
        """Of the shard's record."""
        return f"{shard.receipt.shard:06d}.json"

    def stands(self, shard: Shard) -> bool:
        """Whether the shard's record is there."""
        return self.location.exists(self.key(shard))

    def record(self, shard: Shard) -> HydratedShard:
        """The shard's record. Raises MissingObject or DamagedObject, also where it is another shard's."""
        name = f"{self.folder}/{self.key(shard)}"
        try:
            record = read_record(self.location, self.key(shard), HydratedShard)
        except MissingObject:
            raise MissingObject(f"{name}: {shard.name} is not hydrated; run `functa store hydrate`") from None
        except DamagedObject as error:
            raise DamagedObject(f"{name}: is not a hydrated shard's record ({error}); delete it, then {MEND}") from None
        rows = shard.plan.shard_size(shard.receipt.shard)
        placed = (record.fragment, record.shard, record.rows) == (shard.plan.id, shard.receipt.shard, rows)
        sizes = {array: self.row_bytes(array) * rows for array in ARRAYS}
        if (
            not placed
            or record.source != {array: shard.object(array)[1] for array in ARRAYS}
            or {array: raw.bytes for array, raw in record.raw.items()} != sizes
        ):
            raise DamagedObject(f"{name}: is not of {shard.name}; delete it, then {MEND}")
        return record

    def mapped(self, array: str) -> np.ndarray:
        """The raw file as bytes [rows, bytes of a row], mapped. Raises MissingObject, DamagedObject (short)."""
        path, width = self.path(array), self.row_bytes(array)
        try:
            found = path.stat().st_size
        except FileNotFoundError:
            raise MissingObject(f"{path}: is missing; {MEND}") from None
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror}; look at the disk, or hydrate elsewhere") from None
        if found != self.plan.rows * width:
            raise DamagedObject(f"{path}: has {found} bytes and should have {self.plan.rows * width}; {MEND}")
        return np.memmap(path, np.uint8, "r", shape=(self.plan.rows, width))

    def check(self, shard: Shard, files: dict[str, np.ndarray]) -> None:
        """The shard's rows against its record. Raises MissingObject or DamagedObject naming file and shard."""
        record = self.record(shard)
        start = shard.receipt.shard * self.plan.shard_rows
        for array in ARRAYS:
            if sha256_of(files[array][start : start + record.rows]) != record.raw[array].sha256:
                raise DamagedObject(f"{self.path(array)}: rows of {shard.name} were altered (sha256); {MEND}")


def sha256_of(rows: np.ndarray) -> str:
    """Of the bytes of rows [n, ...], a few at a time: the pages of a mapped file need not all be there at once."""
    hashed = hashlib.sha256()
    flat = rows.reshape(-1).view(np.uint8)
    for start in range(0, len(flat), HASH_BYTES):
        hashed.update(flat[start : start + HASH_BYTES].data)
    return hashed.hexdigest()


def default_folder() -> str:
    """Where hydrated fragments lie unless somebody says otherwise: $XDG_CACHE_HOME/functa/hydrated."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "functa", "hydrated")


@dataclass(frozen=True)
class Hydration:
    """What a call did: where, how many shards there are, how many of them it wrote, and the bytes of these."""

    folder: str
    shards: int
    written: int
    bytes: int


def hydrate(
    functaset: Functaset, folder: str | None = None, progress: Callable[[int, int, int], None] | None = None
) -> Hydration:
    """Write every visible shard's rows of every split as raw local files, each object checked against its receipt.

    What stands is checked and kept; what is damaged is written again; a call after an interruption goes on. Called
    before and after each shard: progress(shards done, shards in all, bytes written). Raises StorageError: no room
    (before anything is written), a damaged object of the functaset, a place that cannot be written to.
    """
    place = default_folder() if folder is None else folder
    inside = open_location(place).uri
    if inside == functaset.location.uri or inside.startswith(f"{functaset.location.uri}/"):
        raise StorageError(f"{place}: lies in the functaset itself; choose another folder")
    fragments = fragments_of(functaset, place)
    left = [(fragment, shard) for fragment, shards in fragments for shard in shards if not _whole(fragment, shard)]
    total = sum(len(shards) for _, shards in fragments)
    with _told(place):
        os.makedirs(place, exist_ok=True)
        open_location(place).preflight_write(sum(_bytes(fragment, shard) for fragment, shard in left))
        written = 0
        for number, (fragment, shard) in enumerate(left):
            if progress:
                progress(total - len(left) + number, total, written)
            _write(fragment, shard)
            written += _bytes(fragment, shard)
    if progress:
        progress(total, total, written)
    return Hydration(place, total, len(left), written)


def fragments_of(functaset: Functaset, folder: str) -> list[tuple[HydratedFragment, list[Shard]]]:
    """Every fragment that has rows to show, with its shards."""
    splits = dict.fromkeys(entry.split for entry in functaset.commit.fragments)
    found = []
    for split in splits:
        for _, group in groupby(SplitShards(functaset, split).shards, key=lambda shard: shard.plan.id):
            shards = list(group)
            found.append((HydratedFragment.of(folder, shards[0]), shards))
    return found


def _bytes(fragment: HydratedFragment, shard: Shard) -> int:
    return sum(fragment.row_bytes(array) for array in ARRAYS) * shard.receipt.rows


def _whole(fragment: HydratedFragment, shard: Shard) -> bool:
    """Whether the shard's rows stand as its record says."""
    if not fragment.stands(shard):
        return False
    try:
        fragment.check(shard, {array: fragment.mapped(array) for array in ARRAYS})
        return True
    except StorageError:
        with suppress(StorageError):  # it vouches for what is not there
            fragment.location.delete(fragment.key(shard))
        return False


def _write(fragment: HydratedFragment, shard: Shard) -> None:
    raw = {}
    for array in ARRAYS:
        rows = np.ascontiguousarray(read_array(shard.location, shard.plan, shard.receipt, array))
        start = shard.receipt.shard * shard.plan.shard_rows
        _put(fragment.path(array), rows, start * fragment.row_bytes(array), fragment)
        raw[array] = ObjectRecord(bytes=rows.nbytes, sha256=sha256_of(rows))
    record = HydratedShard(
        fragment=shard.plan.id, shard=shard.receipt.shard, rows=shard.receipt.rows,
        source={array: shard.object(array)[1] for array in ARRAYS}, raw=raw,
    )  # fmt: skip
    fragment.location.create(fragment.key(shard), seal(record))


def _put(path: Path, rows: np.ndarray, offset: int, fragment: HydratedFragment) -> None:
    """Rows at their place in the fragment's file, durable once the call returns."""
    path.parent.mkdir(exist_ok=True)
    # Not followed where it is a link: in a folder that others can write to, it could lead anywhere.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        size = fragment.plan.rows * fragment.row_bytes(path.stem)
        if os.fstat(descriptor).st_size != size:
            os.ftruncate(descriptor, size)
        view = rows.reshape(-1).data.cast("B")
        while view:
            count = os.pwrite(descriptor, view, offset)
            view, offset = view[count:], offset + count
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _told:
    """Within, an OSError becomes a StorageError of one line."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __enter__(self) -> None: ...

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, OSError):
            mend = "free some space or give this user the right to it, or choose another folder with --to"
            raise StorageError(f"{self.place}: {error.strerror or error}; {mend}") from error
