"""Plans: what a fragment will hold, decided before any worker starts, the same whoever decides it.

    fragments/<id>/plan.json                 Plan, sealed; written last
    fragments/<id>/rows/<shard>.json         keys, labels, tokens and source rows of a shard
    fragments/<id>/{z,label,...}/zarr.json   the arrays, still without shards
    fragments/<id>/quantization/{low,step}

Everything is create-only: two planners of the same fragment share it.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from functa.storage.errors import DamagedObject, MissingObject, StorageError
from functa.storage.functaset.header import create_functaset as create_functaset
from functa.storage.functaset.header import read_root
from functa.storage.functaset.quantizer import Quantizer
from functa.storage.functaset.records import (
    FORMAT,
    ObjectRecord,
    Record,
    canonical,
    digest,
    read_record,
    read_vouched,
    seal,
    vouch,
)
from functa.storage.functaset.zarr_bytes import (
    MAX_CHUNK_BYTES,
    ArraySpec,
    check_document,
    decode,
    encode,
    new_document,
    new_group,
)
from functa.storage.places.location import Location, checked_key

SPLITS = ("train", "test")

FLOATS = ("low", "step")

Name = tuple[bytes, int]  # a row's: its image's id and the number of the augmentation

COLLECT = b"collect"  # the claim on a fragment that is being removed

CODED_CHUNK = 1 << 15  # numbers; of smaller chunks the headers and checksums would cost 0.05 bits a number and more


class Quantization(Record):
    """How a fragment's latents are coded; the ranges stand in quantization/{low,step}."""

    bits: int = Field(ge=1, le=8)
    policy: str
    shape: tuple[int, int, int]
    candidates: dict[str, dict[str, float]] = {}  # of range=auto: what each would have made of the calibration images


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
    def shards(self) -> int:
        """How many shards there are."""
        return -(-self.rows // self.shard_rows)

    @property
    def path(self) -> str:
        """The fragment's folder."""
        return f"fragments/{self.id}"

    def shard_size(self, shard: int) -> int:
        """Rows of one shard; the last may be ragged. Raises ValueError outside."""
        if not 0 <= shard < self.shards:
            raise ValueError(f"shard {shard} of {self.shards}")
        return min(self.shard_rows, self.rows - shard * self.shard_rows)


@dataclass(frozen=True)
class ShardRows:
    """One shard's rows in their order.

    keys and tokens of the images, labels int32 [n], their rows int64 [n] in what was planned, and augmentations int32
    [n]: 0 is the image as it is.
    """

    keys: list[str]
    labels: np.ndarray
    tokens: list[str]
    rows: np.ndarray
    augmentations: np.ndarray

    @property
    def names(self) -> list["Name"]:
        """What tells the rows of a split apart."""
        return [(row_id(key), int(number)) for key, number in zip(self.keys, self.augmentations, strict=True)]


def rows_key(shard: int) -> str:
    """Where a shard's table of rows stands, below the fragment."""
    return f"rows/{shard:06d}.json"


def claim_key(fragment_id: str) -> str:
    """Where it stands whether a fragment is to be shown or removed; no version names it."""
    return f"fragments/{fragment_id}/claim"


def row_id(key: str) -> bytes:
    """16 bytes that name an image by its stable key."""
    return hashlib.sha256(key.encode()).digest()[:16]


def array_specs(plan: Plan) -> dict[str, ArraySpec]:
    """The fragment's row arrays by name, in the order in which a shard's objects are written: z last."""

    def column(dtype: str, *tail: int) -> ArraySpec:
        dimensions = ("row", "byte")[: 1 + len(tail)]
        return ArraySpec((plan.rows, *tail), dtype, plan.shard_rows, plan.shard_rows, "raw", dimensions)

    z = ArraySpec(
        (plan.rows, *plan.latent_shape),
        "uint8" if plan.quantization else "float32",
        plan.shard_rows,
        plan.chunk_rows,
        _codec(plan),
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


def _codec(plan: Plan) -> Literal["raw", "zstd", "exact"]:
    if plan.quantization is None:
        return "raw"  # float32 shrinks by 7 % at most: raw is faster
    # Of 1 or 2 bits zstd makes 1.6 or 2.5: its codes are whole bits, and one for the commonest symbol is too long.
    return plan.codec if plan.quantization.bits > 2 else "exact"


def plan_fragment(
    location: Location,
    *,
    split: str,
    keys: Sequence[str],
    labels: np.ndarray,
    tokens: Sequence[str],
    latent_shape: tuple[int, int, int],
    shard_rows: int,
    chunk_rows: int,
    quantizer: Quantizer | None,
    augmentations: np.ndarray | None = None,
    codec: Literal["zstd", "exact"] = "zstd",
    replaces: str = "",
    versions: Mapping[str, str] | None = None,
    taken: Collection[str] = (),
) -> Plan:
    """Decide a fragment of one split and write its plan; the same rows in the same functaset give the same plan.

    But not under a name that gc has claimed, or that is `taken`: its fragment holds other versions of the rows.

    Rows are stored in the order of their ids, which is as good as random: a reader's shuffle buffer then mixes
    classes; an image's augmentations lie side by side. ShardRows.rows says which of the given rows each is.
    `augmentations` int [n] are all 0 if left out. `shard_rows` and `chunk_rows` are upper bounds: shards are made
    equally long, so that no padding is stored; but a chunk of codes holds CODED_CHUNK numbers if its shard does.
    Raises StorageError.
    """
    numbers = np.zeros(len(keys), np.int32) if augmentations is None else np.asarray(augmentations, np.int32)
    names = [(row_id(key), int(number)) for key, number in zip(keys, numbers, strict=True)]
    if len(keys) == 0 or not len(keys) == len(labels) == len(tokens) or len(set(names)) != len(names):
        raise StorageError(f"plan of split '{split}': needs unique keys, each with label and token, and one at least")
    root = read_root(location)
    order = np.array(sorted(range(len(keys)), key=lambda row: names[row]))
    shard_rows, chunk_rows = _balanced(len(keys), shard_rows, chunk_rows)
    if quantizer is not None:
        chunk_rows = _coarser(shard_rows, chunk_rows, int(np.prod(latent_shape)))
    content: dict[str, Any] = {
        "format": FORMAT,
        "split": split,
        "rows": len(keys),
        "shard_rows": shard_rows,
        "chunk_rows": chunk_rows,
        "latent_shape": tuple(latent_shape),
        "codec": codec,
        "quantization": _summary(quantizer, latent_shape),
        "fingerprint": root.fingerprint_digest,
        "replaces": replaces,
    }
    tables = _tables(keys, labels, tokens, numbers, order, shard_rows)
    ranges = {name: getattr(quantizer, name).tobytes().hex() for name in FLOATS} if quantizer else {}
    identity = {key: value for key, value in content.items() if key != "quantization"} | {
        "bits": quantizer.bits if quantizer else 32,
        "ranges": ranges,
        "tables": [hashlib.sha256(table).hexdigest() for table in tables],
    }
    name = _free_name(location, identity, taken)
    draft = Plan(id=name, objects={}, created_by=dict(versions or {}), **content)
    if location.exists(f"{draft.path}/plan.json"):
        return load_plan(location, draft.id)
    objects = {rows_key(shard): table for shard, table in enumerate(tables)} | _documents(draft, quantizer)
    standing = {key: _put(location, f"{draft.path}/{key}", data) for key, data in objects.items()}
    plan = draft.model_copy(update={"objects": {key: vouch(data) for key, data in standing.items()}})
    location.create(f"{plan.path}/plan.json", seal(plan))
    return load_plan(location, plan.id)


def _free_name(location: Location, identity: dict[str, Any], taken: Collection[str]) -> str:
    """The digest of what a plan says or, where that is taken or claimed by gc, with a number."""
    name = digest(identity)
    for again in count(1):
        if name not in taken and _claim(location, name) != COLLECT:
            return name
        name = digest(identity | {"again": again})
    raise AssertionError


def _claim(location: Location, name: str) -> bytes | None:
    try:
        return location.read(claim_key(name))
    except MissingObject:
        return None


def _balanced(rows: int, shard_rows: int, chunk_rows: int) -> tuple[int, int]:
    """Equal shards of equal chunks, at most as long as asked: a chunk's padding is stored, and read, for nothing."""
    shards = -(-rows // shard_rows)
    longest = -(-rows // shards)
    chunks = -(-longest // min(chunk_rows, shard_rows))
    chunk = -(-longest // chunks)
    return chunk * chunks, chunk


def _coarser(shard_rows: int, chunk_rows: int, dims: int) -> int:
    """So many whole chunks in one that it holds CODED_CHUNK numbers, if the shard does."""
    chunks = shard_rows // chunk_rows
    joined = (n for n in range(1, chunks + 1) if chunks % n == 0 and n * chunk_rows * dims >= CODED_CHUNK)
    return chunk_rows * next(joined, chunks)


def _summary(quantizer: Quantizer | None, latent_shape: tuple[int, int, int]) -> Quantization | None:
    if quantizer is None:
        return None
    shape = np.shape(quantizer.low)
    fits = len(shape) == 3 and all(n in (1, full) for n, full in zip(shape, latent_shape))
    if not fits or np.shape(quantizer.step) != shape:
        raise StorageError(f"quantiser: ranges of shape {shape} do not fit latents {latent_shape}")
    tried = {name: dict(figures) for name, figures in quantizer.candidates.items()}
    return Quantization(bits=quantizer.bits, policy=quantizer.policy, shape=shape, candidates=tried)


def _tables(
    keys: Sequence[str],
    labels: np.ndarray,
    tokens: Sequence[str],
    augmentations: np.ndarray,
    order: np.ndarray,
    shard_rows: int,
) -> list[bytes]:
    tables = []
    for start in range(0, len(order), shard_rows):
        rows = [int(row) for row in order[start : start + shard_rows]]
        table = {
            "keys": [keys[row] for row in rows],
            "labels": [int(labels[row]) for row in rows],
            "tokens": [tokens[row] for row in rows],
            "rows": rows,
        }
        if augmentations.any():
            table["augmentations"] = [int(augmentations[row]) for row in rows]
        tables.append(canonical(table))
    return tables


def _documents(plan: Plan, quantizer: Quantizer | None) -> dict[str, bytes]:
    """All zarr metadata of the fragment, and the ranges."""
    documents = {"zarr.json": new_group({"split": plan.split})}
    for name, spec in array_specs(plan).items():
        attributes: dict[str, Any] = {}
        if name == "z" and plan.quantization:
            attributes = {"bits": plan.quantization.bits, "decode": "quantization/low + (z + 0.5) * quantization/step"}
        documents[f"{name}/zarr.json"] = new_document(spec, attributes)
    if quantizer is not None and plan.quantization:
        documents["quantization/zarr.json"] = new_group(plan.quantization.model_dump(mode="json"))
        spec = _range_spec(plan.quantization)
        for name in FLOATS:
            document = documents[f"quantization/{name}/zarr.json"] = new_document(spec)
            key, data = encode(document, spec, getattr(quantizer, name))
            documents[f"quantization/{name}/{key}"] = data
    return documents


def _range_spec(quantization: Quantization) -> ArraySpec:
    return ArraySpec(quantization.shape, "float32", dimensions=("y", "x", "channel"))


def _put(location: Location, key: str, data: bytes) -> bytes:
    """Create, or adopt what stands: the same for everybody, but that another zarr version words zarr.json otherwise."""
    if location.create(key, data):
        return data
    standing = location.read(key)
    if standing != data and not key.endswith("zarr.json"):
        raise DamagedObject(f"{location.uri}/{key}: holds something else, and no plan vouches for it; delete it")
    return standing


def load_plan(location: Location, fragment_id: str) -> Plan:
    """A standing plan. Raises MissingObject or DamagedObject."""
    key = checked_key(f"fragments/{fragment_id}/plan.json")
    plan = read_record(location, key, Plan)
    if plan.id != fragment_id:
        raise DamagedObject(f"{location.uri}/{key}: is the plan of fragment {plan.id}; it was moved")
    return plan


def plan_rows(location: Location, plan: Plan, shard: int) -> ShardRows:
    """The rows of one shard. Raises ValueError outside the plan, DamagedObject where the table is not what it says."""
    size = plan.shard_size(shard)
    key = rows_key(shard)
    table = json.loads(plan_object(location, plan, key))
    rows = ShardRows(
        table["keys"],
        np.array(table["labels"], np.int32),
        table["tokens"],
        np.array(table["rows"], np.int64),
        np.array(table.get("augmentations", [0] * size), np.int32),
    )
    columns = (rows.keys, rows.labels, rows.tokens, rows.rows, rows.augmentations)
    if any(len(column) != size for column in columns):
        raise DamagedObject(f"{location.uri}/{plan.path}/{key}: has another number of rows than the plan says")
    return rows


def plan_object(location: Location, plan: Plan, key: str) -> bytes:
    """An object of the plan, checked against it. Raises MissingObject or DamagedObject."""
    if key not in plan.objects:
        raise DamagedObject(f"{location.uri}/{plan.path}/plan.json: does not name {key}; restore it from a copy")
    return read_vouched(location, f"{plan.path}/{key}", plan.objects[key])


def array_document(location: Location, plan: Plan, name: str, spec: ArraySpec) -> bytes:
    """A row array's zarr.json, equal to the plan's record and to what the plan's numbers demand."""
    document = plan_object(location, plan, f"{name}/zarr.json")
    try:
        check_document(document, spec)
    except DamagedObject as error:
        raise DamagedObject(f"{location.uri}/{plan.path}/{name}/zarr.json: {error}; restore it from a copy") from None
    return document


def load_quantizer(location: Location, plan: Plan) -> Quantizer | None:
    """The plan's quantiser, None for float32 latents. Raises DamagedObject."""
    if plan.quantization is None:
        return None
    spec = _range_spec(plan.quantization)
    arrays = {}
    for name in FLOATS:
        document = array_document(location, plan, f"quantization/{name}", spec)
        data = plan_object(location, plan, f"quantization/{name}/c/0/0/0")
        arrays[name] = decode(document, spec, data)
    chosen = plan.quantization
    return Quantizer(chosen.bits, arrays["low"], arrays["step"], chosen.policy, chosen.candidates)
