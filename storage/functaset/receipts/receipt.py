"""Receipts: the record of a finished shard, written last, which alone makes the shard count.

fragments/<id>/receipts/<shard>.0.json   Receipt, sealed
fragments/<id>/moments/<shard>.f8        latent moments of the shard's good rows
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
from pydantic import Field

from functa.storage.functaset.records import FORMAT, ObjectRecord, Record

BINS_PER_DB = 10

MAX_PSNR = 100.0  # dB; a perfect reconstruction has an infinite one

IDENTITY = ("id", "label", "augmentation", "source_sha256")  # arrays that identify a row's image and version

CONTENT_MODULUS = 1 << 256


class PsnrSummary(Record):
    """PSNR of good rows: count, sum in dB, and a histogram of bin (tenths of a dB) -> rows."""

    count: int = Field(ge=0)
    sum: float
    histogram: dict[int, int]

    @classmethod
    def of(cls, psnr: np.ndarray) -> "PsnrSummary":
        """Summarise values [n] in dB."""
        capped = np.minimum(psnr.astype(np.float64), MAX_PSNR)
        bins, counts = np.unique(np.floor(capped * BINS_PER_DB).astype(int), return_counts=True)
        histogram = {int(b): int(n) for b, n in zip(bins, counts, strict=True)}
        return cls(count=len(capped), sum=float(capped.sum()), histogram=histogram)


class Receipt(Record):
    """A finished shard's record. `objects` are relative to the fragment's folder."""

    format: Literal[1] = FORMAT
    fragment: str
    shard: int = Field(ge=0)
    rows: int = Field(ge=1)
    bad: dict[int, str]  # row within the shard -> reason; these rows are stored, and never shown
    objects: dict[str, ObjectRecord]
    content: str = Field(pattern=r"^[0-9a-f]{64}$")  # of the good rows' identities, content_of
    psnr: PsnrSummary
    clipped: int = Field(ge=0)  # latent numbers outside the quantiser's range
    seconds: float = Field(ge=0)
    versions: dict[str, str]

    @property
    def good(self) -> int:
        """Number of rows that readers see."""
        return self.rows - len(self.bad)


def content_of(split: str, identities: Mapping[str, np.ndarray]) -> str:
    """Return 64 hex digits of a set of rows, whatever their order and shards: a sum of sha256 over IDENTITY columns."""
    columns = [np.ascontiguousarray(identities[name]) for name in IDENTITY]
    sizes = [column[:1].nbytes if len(column) else 0 for column in columns]
    rows = np.concatenate([column.view(np.uint8).reshape(len(column), size) for column, size in zip(columns, sizes)], 1)
    prefix, size = split.encode(), sum(sizes)
    whole = rows.tobytes()
    total = 0
    for start in range(0, len(whole), max(1, size)):
        total += int.from_bytes(hashlib.sha256(prefix + whole[start : start + size]).digest(), "little")
    return f"{total % CONTENT_MODULUS:064x}"


def sum_of_contents(contents: Iterable[str]) -> str:
    """Return the content of all these sets of rows together."""
    return f"{sum(int(content, 16) for content in contents) % CONTENT_MODULUS:064x}"


def receipt_name(shard: int) -> str:
    """Return the key of a shard's receipt below its fragment."""
    return f"receipts/{shard:06d}.0.json"


def moments_name(shard: int) -> str:
    """Return the key of a shard's moments below its fragment."""
    return f"moments/{shard:06d}.f8"
