"""Plans: what a fragment will hold, decided before any worker starts, and the tables of its rows.

fragments/<id>/plan.json                 Plan, sealed; written last
fragments/<id>/rows/<shard>.json         RowTable: keys, labels, tokens and source rows of a shard
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from functa.storage.errors import StorageError
from functa.storage.functaset.records import FORMAT, ObjectRecord, Record, canonical
from functa.storage.functaset.zarr_bytes import MAX_CHUNK_BYTES, ArraySpec
from functa.storage.places.address import MAX_JSON_BYTES

SPLITS = ("train", "test")

COLLECT = b"collect"  # the claim on a fragment that is being collected

LARGER_SHARDS = "set a larger encode.shard_rows"

# Bytes of JSON: of a shard's table in its plan, of its receipt in every commit, and of all else in either, at most.
PLAN_BYTES, COMMIT_BYTES, OTHER_BYTES = 132, 119, 1 << 16

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

    format: Literal[1] = FORMAT
    id: str = Field(pattern=r"^[0-9a-f]{24}$")
    split: Literal["train", "test"]
    rows: int = Field(ge=1, le=1 << 31)
    shard_rows: int = Field(ge=1, le=1 << 20)
    chunk_rows: int = Field(ge=1, le=1 << 20)
    latent_shape: tuple[int, int, int]
    codec: Literal["zstd", "exact"]
    quantization: Quantization | None
    fingerprint: str
    replaces: str  # the fragment whose rows it holds anew, or empty
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

    keys: list[str]
    labels: np.ndarray
    tokens: list[str]
    augmentations: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(
        cls, keys: Sequence[str], labels: np.ndarray, tokens: Sequence[str], augmentations: np.ndarray | None = None
    ) -> "RowTable":
        """Return rows numbered 0, 1, ...; `augmentations` are all 0 if left out."""
        numbers = np.zeros(len(keys), np.int32) if augmentations is None else np.asarray(augmentations, np.int32)
        return cls(list(keys), np.asarray(labels, np.int32), list(tokens), numbers, np.arange(len(keys)))

    @classmethod
    def join(cls, tables: Sequence["RowTable"]) -> "RowTable":
        """Return the rows of all tables one after the other, numbered anew."""
        keys = [key for table in tables for key in table.keys]
        tokens = [token for table in tables for token in table.tokens]
        labels, numbers = (
            np.concatenate([getattr(table, name) for table in tables]) for name in ("labels", "augmentations")
        )
        return cls.of(keys, labels, tokens, numbers)

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, rows: Sequence[int] | np.ndarray) -> "RowTable":
        """Return these rows alone, in this order."""
        keys, tokens = ([column[row] for row in rows] for column in (self.keys, self.tokens))
        index = np.asarray(rows, np.int64)
        return RowTable(keys, self.labels[index], tokens, self.augmentations[index], self.rows[index])

    @property
    def names(self) -> list[Name]:
        """The names that identify the rows within a split."""
        return [(row_id(key), int(number)) for key, number in zip(self.keys, self.augmentations, strict=True)]

    def to_bytes(self, augmented: bool) -> bytes:
        """Return the table as it is stored; `augmented`: whether any row of the fragment is an augmentation."""
        table: dict[str, Any] = {
            "keys": self.keys,
            "labels": self.labels.tolist(),
            "tokens": self.tokens,
            "rows": self.rows.tolist(),
        }
        if augmented:
            table["augmentations"] = self.augmentations.tolist()
        return canonical(table)

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
            texts = all(isinstance(text, str) for column in (keys, tokens) for text in column)
        except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"not a table of rows ({type(error).__name__})") from None
        shapes = {labels.shape, augmentations.shape, rows.shape, (len(tokens),)}
        if not texts or not isinstance(keys, list) or shapes != {(len(keys),)}:
            raise ValueError("columns of different lengths or types")
        return cls(keys, labels, tokens, augmentations, rows)


def check_shards(name: str, rows: Mapping[str, int], shard_rows: int, committed: int = 0) -> None:
    """Raise StorageError if so many rows, by split, make a plan or a commit that is too long to be read back.

    committed: bytes of the newest commit, which the next one repeats.
    """
    shards = [-(-count // shard_rows) for count in rows.values()]
    longest = max(PLAN_BYTES * max(shards, default=0), COMMIT_BYTES * sum(shards) + committed)
    left = MAX_JSON_BYTES - OTHER_BYTES
    if longest > left:
        enough = -(-shard_rows * longest // max(1, left - committed))
        raise StorageError(
            f"{name}: encode.shard_rows={shard_rows} makes {sum(shards)} shards, whose records would have {longest} "
            f"bytes of JSON, and readers take {MAX_JSON_BYTES} at most; set encode.shard_rows to "
            f"{1 << (enough - 1).bit_length()} or more"
        )


def row_id(key: str) -> bytes:
    """Return the 16 bytes that identify an image by its stable key."""
    return hashlib.sha256(key.encode()).digest()[:16]


def fragment_path(fragment: str) -> str:
    """Return a fragment's folder in the functaset."""
    return f"fragments/{fragment}"


def rows_name(shard: int) -> str:
    """Return the key of a shard's table of rows below its fragment."""
    return f"rows/{shard:06d}.json"


def claim_key(fragment: str) -> str:
    """Return the key of the claim that decides whether a fragment is shown or collected; no version names it."""
    return f"{fragment_path(fragment)}/claim"
