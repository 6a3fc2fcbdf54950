"""Manifests: what the receipts of a fragment's shards hold, in one object, written when the fragment is committed.

    fragments/<id>/manifest.safetensors    columns over shards, and Described as JSON
    fragments/<id>/moments/blocks.f8       moments of blocks of shards, float64 [blocks, 2, s, s, c]

A commit names the manifest instead of every receipt. A reader opens a fragment by its plan and manifest, and a commit
that adds rows reads no receipt of those that exist. The receipts stay beside it: either can be made from the other.
"""

import json
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from functa.storage.errors import DamagedObject
from functa.storage.functaset.plan import Name, Plan, fragment_path
from functa.storage.functaset.receipts.receipt import PsnrSummary, Receipt, moments_name
from functa.storage.functaset.records import FORMAT, ObjectRecord, Record, canonical
from functa.storage.functaset.zarr_bytes import chunk_key

NAME_BYTES = 20  # of an image's id and, big-endian, the number of the augmentation: sorted as the rows are

MANY_SHARDS = 64  # of fragments with more, the moments are merged by blocks of so many shards at least


class Described(Record):
    """The JSON part of a manifest. sorted: whether the rows lie in the order of their names."""

    format: Literal[1] = FORMAT
    fragment: str
    sorted: bool
    block_shards: int = Field(ge=1)
    blocks: ObjectRecord | None  # None: the fragment is one block, and its moments are the shards'
    reasons: tuple[str, ...]
    versions: tuple[dict[str, str], ...]


class Manifest:
    """The receipts of a fragment's shards as columns; each is a few hundred bytes instead of some thousand.

    Arrays of objects are in the order of the plan's, the shard's moments last.
    """

    def __init__(self, plan: Plan, described: Described, columns: dict[str, np.ndarray]) -> None:
        self.plan, self.described, self.columns = plan, described, columns

    @classmethod
    def from_bytes(cls, data: bytes, plan: Plan, name: str) -> "Manifest":
        """Return a stored one. Raises DamagedObject naming it, where it is none, or not this plan's."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            columns = load(data)
            described = Described.model_validate(json.loads(columns.pop("described").tobytes()))
            _check(plan, described, columns)
        except (SafetensorError, ValidationError, ValueError, KeyError, TypeError, RecursionError) as error:
            fault = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DamagedObject(f"{name}: is not this fragment's manifest ({fault}); restore it from a copy") from None
        return cls(plan, described, columns)

    def to_bytes(self) -> bytes:
        """The inverse of from_bytes; the same for the same receipts."""
        from safetensors.numpy import save

        described = np.frombuffer(canonical(self.described.model_dump(mode="json")), np.uint8)
        return save(self.columns | {"described": described})

    @property
    def rows(self) -> int:
        """Number of good rows."""
        return self.plan.rows - self.bad

    @property
    def bad(self) -> int:
        """Number of bad rows."""
        return len(self.columns["bad_rows"])

    def receipt_record(self, shard: int) -> ObjectRecord:
        """Return length and sha256 of a shard's receipt."""
        return self._record("receipt", shard)

    def moments_record(self, shard: int) -> ObjectRecord:
        """Return those of its moments."""
        return self._record("object", (shard, len(self.plan.arrays)))

    def array_record(self, shard: int, array: str) -> ObjectRecord:
        """Return those of an array's object."""
        return self._record("object", (shard, list(self.plan.arrays).index(array)))

    def _record(self, column: str, at: int | tuple[int, int]) -> ObjectRecord:
        length, sha256 = self.columns[f"{column}_bytes"][at], self.columns[f"{column}_sha256"][at]
        return ObjectRecord.model_construct(bytes=int(length), sha256=sha256.tobytes().hex())

    @property
    def receipt_digests(self) -> list[str]:
        """The sha256 of every receipt."""
        return [row.tobytes().hex() for row in self.columns["receipt_sha256"]]

    def content(self, shard: int) -> str:
        """Return the content of a shard's good rows."""
        return str(self.columns["content"][shard].tobytes().hex())

    def bad_rows(self, shard: int) -> np.ndarray:
        """Return the numbers of a shard's bad rows, within the shard."""
        return self.columns["bad_rows"][self._bad(shard)].astype(np.int64) - shard * self.plan.shard_rows

    def _bad(self, shard: int) -> slice:
        first = shard * self.plan.shard_rows
        start, stop = np.searchsorted(self.columns["bad_rows"], [first, first + self.plan.shard_rows])
        return slice(start, stop)

    def receipt(self, shard: int) -> Receipt:
        """Return a shard's receipt, as its own object holds it."""
        columns, bad = self.columns, self._bad(shard)
        reasons = [self.described.reasons[number] for number in columns["bad_reasons"][bad].tolist()]
        bins = slice(*columns["psnr_starts"][shard : shard + 2])
        histogram = dict(zip(columns["psnr_bins"][bins].tolist(), columns["psnr_counts"][bins].tolist(), strict=True))
        objects = {
            f"{name}/{chunk_key(spec, shard)}": self.array_record(shard, name)
            for name, spec in self.plan.arrays.items()
        }
        return Receipt.model_construct(
            format=FORMAT, fragment=self.plan.id, shard=shard, rows=self.plan.shard_size(shard),
            bad=dict(zip(self.bad_rows(shard).tolist(), reasons, strict=True)),
            objects=objects | {moments_name(shard): self.moments_record(shard)},
            content=columns["content"][shard].tobytes().hex(),
            psnr=PsnrSummary.model_construct(
                count=int(columns["psnr_count"][shard]), sum=float(columns["psnr_sum"][shard]), histogram=histogram
            ),
            clipped=int(columns["clipped"][shard]), seconds=float(columns["seconds"][shard]),
            versions=self.described.versions[columns["versions"][shard]],
        )  # fmt: skip

    def shards_with(self, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Return the numbers of all shards that can hold a name between first[i] and last[i], for any i."""
        if not self.described.sorted:
            return np.arange(self.plan.shards)
        starts = as_names(self.columns["first_names"])
        low = np.maximum(np.searchsorted(starts, first, "right") - 1, 0)
        high = np.searchsorted(starts, last, "right")
        runs = {(low, high) for low, high in zip(low.tolist(), high.tolist(), strict=True)}
        return np.unique(np.concatenate([np.arange(*run) for run in runs] or [np.arange(0)]))


def contents_of(data: bytes, name: str) -> list[str]:
    """Return the contents of all shards of a stored manifest, whose plan need not be there. Raises DamagedObject."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return [row.tobytes().hex() for row in load(data)["content"]]
    except (SafetensorError, ValueError, KeyError) as error:
        raise DamagedObject(f"{name}: is not a manifest ({error}); restore it from a copy") from None


class ManifestWriter:
    """Collects the receipts of a fragment's shards, in order."""

    def __init__(self, plan: Plan) -> None:
        n, objects = plan.shards, len(plan.arrays) + 1
        self.plan = plan
        self.columns: dict[str, np.ndarray] = {
            "receipt_bytes": np.zeros(n, np.int64), "receipt_sha256": np.zeros((n, 32), np.uint8),
            "object_bytes": np.zeros((n, objects), np.int64), "object_sha256": np.zeros((n, objects, 32), np.uint8),
            "content": np.zeros((n, 32), np.uint8), "psnr_count": np.zeros(n, np.int64), "psnr_sum": np.zeros(n),
            "clipped": np.zeros(n, np.int64), "seconds": np.zeros(n), "versions": np.zeros(n, np.int64),
            "first_names": np.zeros((n, NAME_BYTES), np.uint8),
        }  # fmt: skip
        self.lists: dict[str, list[Any]] = {"bad_rows": [], "bad_reasons": [], "psnr_bins": [], "psnr_counts": []}
        self.psnr_starts = [0]
        self.reasons: dict[str, int] = {}
        self.versions: dict[str, int] = {}
        self.sorted, self.last = True, b""

    def add(self, receipt: Receipt, record: ObjectRecord, names: Sequence[Name]) -> None:
        """Take the next shard's receipt, its record and the names of the shard's rows. Raises ValueError."""
        shard, columns, arrays = receipt.shard, self.columns, self.plan.arrays
        keys = [f"{name}/{chunk_key(spec, shard)}" for name, spec in arrays.items()] + [moments_name(shard)]
        if set(keys) != receipt.objects.keys():
            raise ValueError(f"does not name {min(set(keys) ^ receipt.objects.keys())}, or not only its own objects")
        columns["receipt_bytes"][shard], columns["receipt_sha256"][shard] = record.bytes, _digest(record.sha256)
        for i, found in enumerate(receipt.objects[key] for key in keys):
            columns["object_bytes"][shard, i], columns["object_sha256"][shard, i] = found.bytes, _digest(found.sha256)
        columns["content"][shard] = _digest(receipt.content)
        columns["psnr_count"][shard], columns["psnr_sum"][shard] = receipt.psnr.count, receipt.psnr.sum
        columns["clipped"][shard], columns["seconds"][shard] = receipt.clipped, receipt.seconds
        versions = json.dumps(receipt.versions, sort_keys=True)
        columns["versions"][shard] = self.versions.setdefault(versions, len(self.versions))
        for row, reason in sorted(receipt.bad.items()):
            self.lists["bad_rows"].append(shard * self.plan.shard_rows + row)
            self.lists["bad_reasons"].append(self.reasons.setdefault(reason, len(self.reasons)))
        self.lists["psnr_bins"] += receipt.psnr.histogram.keys()
        self.lists["psnr_counts"] += receipt.psnr.histogram.values()
        self.psnr_starts.append(len(self.lists["psnr_bins"]))
        mine = [name_bytes(name) for name in names]
        columns["first_names"][shard] = np.frombuffer(mine[0], np.uint8)
        self.sorted &= self.last < mine[0] and mine == sorted(mine)
        self.last = mine[-1]

    def manifest(self, block_shards: int, blocks: ObjectRecord | None) -> Manifest:
        """Return the manifest, once every shard was added. blocks: of the object of moments of blocks."""
        described = Described(
            fragment=self.plan.id, sorted=self.sorted, block_shards=block_shards, blocks=blocks,
            reasons=tuple(self.reasons), versions=tuple(json.loads(text) for text in self.versions),
        )  # fmt: skip
        columns = self.columns | {name: np.array(values, np.int64) for name, values in self.lists.items()}
        columns["psnr_starts"] = np.array(self.psnr_starts, np.int64)
        return Manifest(self.plan, described, {name: _narrow(column) for name, column in columns.items()})


def shards_of_block(shards: int) -> int:
    """Return how many shards make a block, so that neither a block nor all blocks take many reads."""
    return max(MANY_SHARDS, int(np.ceil(np.sqrt(shards) / 2)))


def manifest_key(fragment: str) -> str:
    """Return the key of a fragment's manifest in the functaset."""
    return f"{fragment_path(fragment)}/manifest.safetensors"


def blocks_key(fragment: str) -> str:
    """Return the key of the moments of a fragment's blocks in the functaset."""
    return f"{fragment_path(fragment)}/moments/blocks.f8"


def name_bytes(name: Name) -> bytes:
    """Return a row's name as bytes that sort as names do."""
    return name[0] + int(name[1]).to_bytes(NAME_BYTES - 16, "big")


def as_names(rows: np.ndarray | Sequence[bytes]) -> np.ndarray:
    """Return names, uint8 [n, 20] or bytes, as an array that can be sorted and searched."""
    data = rows.tobytes() if isinstance(rows, np.ndarray) else b"".join(rows)
    return np.frombuffer(data, f"S{NAME_BYTES}")


def _digest(text: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(text), np.uint8)


def _narrow(column: np.ndarray) -> np.ndarray:
    """Return whole numbers in the smallest type that holds them all, at least of 16 bits."""
    if column.dtype != np.int64:
        return column
    low, high = (int(column.min()), int(column.max())) if column.size else (0, 0)
    fits = (kind for kind in (np.int16, np.int32) if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max)
    return column.astype(next(fits, np.int64))


WHOLE, REAL, BYTES = ("<i2", "<i4", "<i8"), ("<f8",), ("|u1",)


def _check(plan: Plan, described: Described, columns: dict[str, np.ndarray]) -> None:
    """Raise ValueError where the columns cannot be of this plan's shards."""
    n, k, bad, bins = plan.shards, len(plan.arrays) + 1, len(columns["bad_rows"]), len(columns["psnr_bins"])
    wanted: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
        "receipt_bytes": (WHOLE, (n,)), "receipt_sha256": (BYTES, (n, 32)), "object_bytes": (WHOLE, (n, k)),
        "object_sha256": (BYTES, (n, k, 32)), "content": (BYTES, (n, 32)), "psnr_count": (WHOLE, (n,)),
        "psnr_sum": (REAL, (n,)), "clipped": (WHOLE, (n,)), "seconds": (REAL, (n,)), "versions": (WHOLE, (n,)),
        "first_names": (BYTES, (n, NAME_BYTES)), "bad_rows": (WHOLE, (bad,)), "bad_reasons": (WHOLE, (bad,)),
        "psnr_bins": (WHOLE, (bins,)), "psnr_counts": (WHOLE, (bins,)), "psnr_starts": (WHOLE, (n + 1,)),
    }  # fmt: skip
    for name, (kinds, shape) in wanted.items():
        if columns[name].dtype.str not in kinds or columns[name].shape != shape:
            raise ValueError(f"{name} is {columns[name].dtype} {columns[name].shape}")
    rows, starts = columns["bad_rows"].astype(np.int64), columns["psnr_starts"]
    whole = described.fragment == plan.id and columns.keys() == wanted.keys()
    whole = whole and _within(columns["versions"], len(described.versions))
    whole = whole and _within(columns["bad_reasons"], len(described.reasons)) and _within(rows, plan.rows)
    whole = whole and bool((np.diff(rows) > 0).all() and (np.diff(starts.astype(np.int64)) >= 0).all())
    whole = whole and (starts[0], starts[-1]) == (0, bins) and int(columns["object_bytes"].min()) >= 0
    if not whole:
        raise ValueError("columns of another fragment, or out of bounds")


def _within(column: np.ndarray, count: int) -> bool:
    return column.size == 0 or bool(column.min() >= 0 and column.max() < count)
