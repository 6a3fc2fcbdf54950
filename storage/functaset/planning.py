"""Planning of a fragment: which rows go where and how they are coded, the same whoever decides it.

    fragments/<id>/{z,label,...}/zarr.json   the arrays, still without shards
    fragments/<id>/quantization/{low,step}   the quantiser's ranges

Everything is create-only: two planners of the same fragment share it.
"""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import replace
from itertools import count
from typing import Any, Literal

import numpy as np

from functa.storage.errors import DamagedObject, MissingObject, StorageError
from functa.storage.functaset.fragment import Fragment
from functa.storage.functaset.header import read_root
from functa.storage.functaset.plan import (
    COLLECT,
    LARGER_SHARDS,
    LISTED_SHARDS,
    TABLES,
    Plan,
    Quantization,
    RowTable,
    check_rows,
    claim_key,
    row_ids,
    rows_name,
)
from functa.storage.functaset.quantizer import Quantizer
from functa.storage.functaset.records import FORMAT, ObjectRecord, create_record, digest, vouch
from functa.storage.functaset.zarr_bytes import encode, new_document, new_group
from functa.storage.places.location import Location
from functa.storage.places.side_by_side import side_by_side

CODED_CHUNK = 1 << 15  # numbers; of smaller chunks the headers and checksums would cost 0.05 bits a number and more


def plan_fragment(
    location: Location,
    rows: RowTable,
    *,
    split: str,
    latent_shape: tuple[int, int, int],
    shard_rows: int,
    chunk_rows: int,
    quantizer: Quantizer | None,
    codec: Literal["zstd", "exact"] = "zstd",
    replaces: str = "",
    versions: Mapping[str, str] | None = None,
    taken: Collection[str] = (),
) -> Fragment:
    """Decide a fragment of one split and write its plan; the same rows in the same functaset give the same plan.

    But not under a name that gc has claimed, or that is `taken`: its fragment holds other versions of the rows.

    Rows are stored in the order of their ids, which is as good as random: a reader's shuffle buffer then mixes
    classes; an image's augmentations lie side by side. RowTable.rows of a shard are numbers of the given rows.
    `shard_rows` and `chunk_rows` are upper bounds: shards are made equally long, so that no padding is stored; but a
    chunk of codes holds CODED_CHUNK numbers if its shard does. replaces: the fragment whose rows it holds anew.
    Raises StorageError.
    """
    order = _order(rows)
    if order is None or not len(rows) == len(rows.labels) == len(rows.tokens):
        raise StorageError(f"plan of split '{split}': needs unique keys, each with label and token, and one at least")
    check_rows(location.uri, {split: len(rows)})
    root = read_root(location)
    numbered = replace(rows, rows=np.arange(len(rows)))
    shard_rows, chunk_rows = _balanced(len(rows), shard_rows, chunk_rows)
    if quantizer is not None:
        chunk_rows = _coarser(shard_rows, chunk_rows, int(np.prod(latent_shape)))
    content: dict[str, Any] = {
        "format": FORMAT,
        "split": split,
        "rows": len(rows),
        "shard_rows": shard_rows,
        "chunk_rows": chunk_rows,
        "latent_shape": tuple(latent_shape),
        "codec": codec,
        "quantization": _described(quantizer, latent_shape),
        "fingerprint": root.fingerprint_digest,
        "replaces": replaces,
    }
    parts = (order[start : start + shard_rows] for start in range(0, len(order), shard_rows))
    augmented = bool(rows.augmentations.any())
    tables = [numbered.take(part).to_bytes(augmented) for part in parts]
    identity = {key: value for key, value in content.items() if key != "quantization"} | {
        "bits": quantizer.bits if quantizer else 32,
        "ranges": {name: values.tobytes().hex() for name, values in _ranges(quantizer).items()},
        "tables": [hashlib.sha256(table).hexdigest() for table in tables],
    }
    name = _free_name(location, identity, taken)
    draft = Plan(id=name, objects={}, created_by=dict(versions or {}), **content)
    receipts = location.list(f"{draft.path}/receipts/")  # listed first: a plan is there before any receipt
    if not location.exists(f"{draft.path}/plan.json"):
        if receipts:
            raise DamagedObject(
                f"{location.uri}/{draft.path}: has receipts of shards and no plan, as is left where a folder is "
                f"deleted during an encoding; delete it, then run the same command again"
            )
        plan = _written(location, draft, tables, _documents(draft, quantizer))
        create_record(location, f"{plan.path}/plan.json", plan, LARGER_SHARDS)
    return Fragment.load(location, name)


def _written(location: Location, draft: Plan, tables: list[bytes], documents: dict[str, bytes]) -> Plan:
    """Write all objects of a plan; return it with their records."""

    def put(named: tuple[str, bytes]) -> tuple[str, ObjectRecord]:
        key, data = named
        return key, vouch(_put(location, f"{draft.path}/{key}", data))

    named = [(rows_name(shard), table) for shard, table in enumerate(tables)]
    if draft.shards <= LISTED_SHARDS:
        return draft.model_copy(update={"objects": dict(side_by_side(location, put, [*named, *documents.items()]))})
    records = b"".join(
        record.bytes.to_bytes(8, "little") + bytes.fromhex(record.sha256)
        for _, record in side_by_side(location, put, named)
    )
    objects = dict(side_by_side(location, put, [(TABLES, records), *documents.items()]))
    return draft.model_copy(update={"format": 2, "objects": objects})


def _order(rows: RowTable) -> np.ndarray | None:
    """Return rows in the order of their ids, and an image's by augmentation; None for no rows, or two of one name."""
    if not len(rows):
        return None
    ids = row_ids(rows.keys).view(">u8").astype(np.uint64)
    if not rows.augmentations.any():
        order = np.argsort(ids[:, 0])
        if (ids[order[1:], 0] != ids[order[:-1], 0]).all():  # as all but always: half an id is 64 bits
            return order
    columns = (rows.augmentations, ids[:, 1], ids[:, 0])
    order = np.lexsort(columns)
    repeated = np.ones(len(rows) - 1, bool)
    for column in columns:
        repeated &= column[order[1:]] == column[order[:-1]]
    return None if repeated.any() else order


def _free_name(location: Location, identity: dict[str, Any], taken: Collection[str]) -> str:
    """Return the digest of what a plan holds or, where that is taken or claimed by gc, the digest with a number."""
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
    """Join so many whole chunks that they hold CODED_CHUNK numbers, if the shard does."""
    chunks = shard_rows // chunk_rows
    joined = (n for n in range(1, chunks + 1) if chunks % n == 0 and n * chunk_rows * dims >= CODED_CHUNK)
    return chunk_rows * next(joined, chunks)


def _ranges(quantizer: Quantizer | None) -> dict[str, np.ndarray]:
    return {"low": quantizer.low, "step": quantizer.step} if quantizer else {}


def _described(quantizer: Quantizer | None, latent_shape: tuple[int, int, int]) -> Quantization | None:
    if quantizer is None:
        return None
    shape = np.shape(quantizer.low)
    fits = len(shape) == 3 and all(n in (1, full) for n, full in zip(shape, latent_shape))
    if not fits or np.shape(quantizer.step) != shape:
        raise StorageError(f"quantiser: ranges of shape {shape} do not fit latents {latent_shape}")
    tried = {name: dict(figures) for name, figures in quantizer.candidates.items()}
    return Quantization(bits=quantizer.bits, policy=quantizer.policy, shape=shape, candidates=tried)


def _documents(plan: Plan, quantizer: Quantizer | None) -> dict[str, bytes]:
    """Return all zarr metadata of the fragment, and the ranges, by key."""
    documents = {"zarr.json": new_group({"split": plan.split})}
    for name, spec in plan.arrays.items():
        attributes: dict[str, Any] = {}
        if name == "z" and plan.quantization:
            attributes = {"bits": plan.quantization.bits, "decode": "quantization/low + (z + 0.5) * quantization/step"}
        documents[f"{name}/zarr.json"] = new_document(spec, attributes)
    if plan.quantization:
        documents["quantization/zarr.json"] = new_group(plan.quantization.model_dump(mode="json"))
        spec = plan.quantization.range_spec
        for name, values in _ranges(quantizer).items():
            document = documents[f"quantization/{name}/zarr.json"] = new_document(spec)
            key, data = encode(document, spec, values)
            documents[f"quantization/{name}/{key}"] = data
    return documents


def _put(location: Location, key: str, data: bytes) -> bytes:
    """Create an object, or adopt the one there: equal, but that another zarr version may word zarr.json otherwise."""
    if location.create(key, data):
        return data
    existing = location.read(key)
    if existing != data and not key.endswith("zarr.json"):
        raise DamagedObject(f"{location.uri}/{key}: holds something else, and no plan records it; delete it")
    return existing
