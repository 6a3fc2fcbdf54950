"""Plans: what a fragment will hold, decided before any worker starts, and the tables of its rows.

fragments/<id>/plan.json                 Plan, sealed; written last
fragments/<id>/rows/<shard>.json         RowTable: keys, labels, tokens and source rows of a shard
fragments/<id>/rows/records.bin          of a plan of many shards: length and sha256 of every table
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from functa.storage.errors import StorageError
from functa.storage.functaset.records import FORMAT, ObjectRecord, Record
from functa.storage.functaset.zarr_bytes import MAX_CHUNK_BYTES, ArraySpec
from functa.storage.texts import CHUNK, Texts, as_json, encoded, runs, taken

SPLITS = ("train", "test")

COLLECT = b"collect"  # the claim on a fragment that is being collected

LARGER_SHARDS = "set a larger encode.shard_rows"

TABLES = "rows/records.bin"  # a row for each shard: its table's length, little-endian, and sha256

TABLE_BYTES = 40

LISTED_SHARDS = 1000  # of more, the plan does not list the tables: every task would read a plan of many megabytes

MOST_ROWS = 1 << 31  # of a fragment

Name = tuple[bytes, int]  # identifies a row: its image's id and the number of the augmentation


class Quantization(Record):
    """The coding of a fragment's latents; the ranges are in quantization/{low,step}."""

    bits: int = Field(ge=1, le=8)
    policy: str
    shape: tuple[int, int, int]
    candidates: dict[str, dict[str, float]] = {}  # range=auto: the figures of each range that it chose from

    @property
    def range_spec(self) -> ArraySpec:
        """Shape and type of low and step."""
        return ArraySpec(self.shape, "float32", dimensions=("y", "x", "channel"))


class Plan(Record):
    """A fragment's plan. Its id is a digest of everything here but `objects` and `created_by`, and of its rows.

    And of a number where gc has collected fragments of those names.
    """

    format: Literal[1, 2] = FORMAT  # 2: the tables' records are in TABLES
    id: str = Field(pattern=r"^[0-9a-f]{24}$")
    split: Literal["train", "test"]
    rows: int = Field(ge=1, le=MOST_ROWS)
    shard_rows: int = Field(ge=1, le=1 << 20)
    chunk_rows: int = Field(ge=1, le=1 << 20)
    latent_shape: tuple[int, int, int]
    codec: Literal["zstd", "exact"]
    quantization: Quantization | None
    fingerprint: str
    replaces: str  # the fragments whose rows it holds anew, with spaces between, or empty
    objects: dict[str, ObjectRecord]  # all that the plan itself put below fragments/<id>/, but plan.json
    created_by: dict[str, str]

    @model_validator(mode="after")
    def _possible(self) -> "Plan":
        if min(self.latent_shape) < 1 or self.shard_rows % self.chunk_rows:
            raise ValueError("latent shape or chunk rows are impossible")
        if self.dims * 4 * self.shard_rows > MAX_CHUNK_BYTES:
            raise ValueError(f"a shard of {self.shard_rows} rows of {self.dims} numbers is too large; lower shard_rows")
        return self

    @property
    def dims(self) -> int:
        """Numbers per latent."""
        return int(np.prod(self.latent_shape, dtype=object))

    @property
    def bits(self) -> int:
        """Bits per latent number before entropy coding; 32 for float32."""
        return self.quantization.bits if self.quantization else 32

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.shard_rows)

    @property
    def path(self) -> str:
        """The fragment's folder in the functaset."""
        return fragment_path(self.id)

    def shard_size(self, shard: int) -> int:
        """Return the rows of one shard; the last may be ragged. Raises ValueError outside."""
        if not 0 <= shard < self.shards:
            raise ValueError(f"shard {shard} of {self.shards}")
        return min(self.shard_rows, self.rows - shard * self.shard_rows)

    @cached_property
    def arrays(self) -> dict[str, ArraySpec]:
        """The fragment's row arrays by name, in the order in which a shard's objects are written: z last."""

        def column(dtype: str, *tail: int) -> ArraySpec:
            dimensions = ("row", "byte")[: 1 + len(tail)]
            return ArraySpec((self.rows, *tail), dtype, self.shard_rows, self.shard_rows, "raw", dimensions)

        z = ArraySpec(
            (self.rows, *self.latent_shape),
            "uint8" if self.quantization else "float32",
            self.shard_rows,
            self.chunk_rows,
            self._z_codec,
            ("row", "y", "x", "channel"),
        )
        return {
            "psnr": column("float32"),
            "label": column("int32"),
            "id": column("uint8", 16),
            "augmentation": column("int32"),
            "source_sha256": column("uint8", 32),
            "z": z,
        }

    @property
    def _z_codec(self) -> Literal["raw", "zstd", "exact"]:
        if self.quantization is None:
            return "raw"  # float32 shrinks by 7 % at most: raw is faster
        # Of 1 or 2 bits zstd makes 1.6 or 2.5: its codes are whole bits, and one for the commonest symbol is too long.
        return self.codec if self.quantization.bits > 2 else "exact"


@dataclass(frozen=True, eq=False)
class RowTable:
    """Rows in an order: of a shard, of a fragment to be planned, or of an image source.

    keys and version tokens of the images; labels int32 [n]; augmentations int32 [n], 0 for the image as it is; rows
    int64 [n], each one's number in the table that was planned.
    """

    keys: Sequence[str]
    labels: np.ndarray
    tokens: Sequence[str]
    augmentations: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(
        cls, keys: Sequence[str], labels: np.ndarray, tokens: Sequence[str], augmentations: np.ndarray | None = None
    ) -> "RowTable":
        """Return rows numbered 0, 1, ...; `augmentations` are all 0 if left out."""
        numbers = np.zeros(len(keys), np.int32) if augmentations is None else np.asarray(augmentations, np.int32)
        return cls(keys, np.asarray(labels, np.int32), tokens, numbers, np.arange(len(keys)))

    @classmethod
    def join(cls, tables: Sequence["RowTable"]) -> "RowTable":
        """Return the rows of all tables one after the other, numbered anew."""
        keys = Texts.of(key for table in tables for key in table.keys)
        tokens = Texts.of(token for table in tables for token in table.tokens)
        labels, numbers = (
            np.concatenate([getattr(table, name) for table in tables]) for name in ("labels", "augmentations")
        )
        return cls.of(keys, labels, tokens, numbers)

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, rows: Sequence[int] | np.ndarray) -> "RowTable":
        """Return these rows alone, in this order."""
        index = np.asarray(rows, np.int64)
        keys, tokens = taken(self.keys, index), taken(self.tokens, index)
        return RowTable(keys, self.labels[index], tokens, self.augmentations[index], self.rows[index])

    @property
    def names(self) -> list[Name]:
        """The names that identify the rows within a split."""
        return [(row_id(key), int(number)) for key, number in zip(self.keys, self.augmentations, strict=True)]

    def to_bytes(self, augmented: bool) -> bytes:
        """Return the table as it is stored; `augmented`: whether any row of the fragment is an augmentation."""
        numbers = {"labels": self.labels, "rows": self.rows}
        if augmented:
            numbers["augmentations"] = self.augmentations
        columns = {name: str(column.tolist()).replace(" ", "").encode() for name, column in numbers.items()}
        columns |= {"keys": as_json(self.keys), "tokens": as_json(self.tokens)}
        return b"{" + b",".join(b'"%s":%s' % (name.encode(), columns[name]) for name in sorted(columns)) + b"}"

    @classmethod
    def from_bytes(cls, data: bytes) -> "RowTable":
        """Return a stored table. Raises ValueError for anything else."""
        try:
            table = json.loads(data)
            keys, tokens = table["keys"], table["tokens"]
            numbers = [table["labels"], table.get("augmentations", [0] * len(keys)), table["rows"]]
            labels, augmentations, rows = (
                np.array(column, kind) for column, kind in zip(numbers, (np.int32, np.int32, np.int64), strict=True)
            )
            texts = {*map(type, keys), *map(type, tokens)} <= {str}
        except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"not a table of rows ({type(error).__name__})") from None
        shapes = {labels.shape, augmentations.shape, rows.shape, (len(tokens),)}
        if not texts or not isinstance(keys, list) or shapes != {(len(keys),)}:
            raise ValueError("columns of different lengths or types")
        return cls(keys, labels, tokens, augmentations, rows)


def check_rows(name: str, rows: Mapping[str, int]) -> None:
    """Raise StorageError if a split has more rows than one fragment holds."""
    for split, count in rows.items():
        if count > MOST_ROWS:
            raise StorageError(
                f"{name}: {count} rows of split '{split}', and one encoding takes {MOST_ROWS} at most; set a smaller "
                f"images.limit or encode.augmentation.count, encode, then raise it and encode again"
            )


def row_id(key: str) -> bytes:
    """Return the 16 bytes that identify an image by its stable key."""
    return hashlib.sha256(key.encode()).digest()[:16]


def row_ids(keys: Sequence[str]) -> np.ndarray:
    """Return the ids of many images, uint8 [n, 16]; keys that repeat side by side are hashed once."""
    which, different = runs(keys)
    texts, ids = encoded(different), np.empty((len(different), 16), np.uint8)
    for start in range(0, len(ids), CHUNK):
        whole = b"".join([hashlib.sha256(data).digest() for data in islice(texts, CHUNK)])
        ids[start : start + CHUNK] = np.frombuffer(whole, np.uint8).reshape(-1, 32)[:, :16]
    return ids if which is None else ids[which]


def fragment_path(fragment: str) -> str:
    """Return a fragment's folder in the functaset."""
    return f"fragments/{fragment}"


def rows_name(shard: int) -> str:
    """Return the key of a shard's table of rows below its fragment."""
    return f"rows/{shard:06d}.json"


def claim_key(fragment: str) -> str:
    """Return the key of the claim that decides whether a fragment is shown or collected; no version names it."""
    return f"{fragment_path(fragment)}/claim"
