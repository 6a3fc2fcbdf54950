"""Hydrated fragments: rows as raw C-order files on this machine, beside records that vouch for them.

    <folder>/<fragment>-<digest of its receipts>/{z,label,id}.raw    all rows of the fragment, bad ones too
    <folder>/<fragment>-<digest of its receipts>/<shard>.json        HydratedShard, sealed; written when its rows are in

One file an array, so that a batch is one gather. A shard's rows lie at a fixed place of it and are always the same
bytes, so that two who hydrate at once, or one who was killed, do no harm: rows without a record do not count.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from storage.errors import DamagedObject, MissingObject, StorageError
from storage.local import LocalLocation
from storage.locations import Location
from storage.plans import Plan, array_specs
from storage.records import FORMAT, ObjectRecord, Record, digest, read_record
from storage.shards import Shard

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
