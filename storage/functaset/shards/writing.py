"""Writing of shards: whole, one create-only object per array, then the receipt, which alone makes them count.

    fragments/<id>/<array>/c/<shard>/0...    one object per array and shard

A task that runs twice changes nothing: objects that exist and are whole are adopted. So there are no leases, and a
writer that wakes up late finds its shard done. Damage is never overwritten in place: a repair is a fragment of its own.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from functa.storage.errors import DamagedObject, StorageError
from functa.storage.functaset.plan import row_ids
from functa.storage.functaset.quantizer import refuse_clipping
from functa.storage.functaset.receipts.moments import moments_of
from functa.storage.functaset.receipts.receipt import IDENTITY, PsnrSummary, Receipt, content_of, moments_name
from functa.storage.functaset.records import ObjectRecord, create_record, vouch
from functa.storage.functaset.shards.shard import Shard
from functa.storage.functaset.zarr_bytes import encode
from functa.storage.places.local import LocalLocation


@dataclass(frozen=True)
class _Block:
    """A shard's arrays by name, row -> reason of its bad rows, and how many numbers the quantiser clipped."""

    arrays: dict[str, np.ndarray]
    bad: dict[int, str]
    clipped: int


@dataclass(frozen=True)
class _Stored:
    """One array's rows as they are stored, with the key and the record of their object."""

    rows: np.ndarray
    key: str
    record: ObjectRecord


def write_shard(
    shard: Shard,
    *,
    latents: np.ndarray,
    psnr: np.ndarray,
    sha256: np.ndarray,
    good: np.ndarray | None = None,
    reasons: Mapping[int, str] | None = None,
    max_clip_fraction: float = 0.01,
    seconds: float = 0.0,
    versions: dict[str, str] | None = None,
) -> Receipt:
    """Write a whole shard, or adopt the one that exists; return its receipt.

    latents float32 [n, s, s, c], psnr [n] in dB, sha256 uint8 [n, 32], good bool [n] (all if left out), reasons by row
    of the shard; n must be the shard's whole length, rows in its table's order (ValueError). Rows that are not good are
    stored as NaN (code 0) and masked. A good row whose latent or PSNR is not finite is bad: 'diverged'.
    Raises StorageError: full disk, more clipped numbers than `clip_limit` allows for so many rows.
    """
    existing = shard.find_receipt()
    if existing is not None:
        return existing
    plan = shard.fragment.plan
    for name, array, tail in (("latents", latents, plan.latent_shape), ("psnr", psnr, ()), ("sha256", sha256, (32,))):
        if np.shape(array) != (shard.size, *tail):
            raise ValueError(
                f"{name} {np.shape(array)} is not the whole of shard {shard.number}: {(shard.size, *tail)}"
            )
    marked = np.ones(shard.size, bool) if good is None else np.asarray(good, bool)
    block = _prepare(shard, latents, psnr, sha256, marked, reasons or {})
    rows = shard.size - len(block.bad)
    refuse_clipping(f"fragment {plan.id}, shard {shard.number}", block.clipped, rows, plan.dims, max_clip_fraction)
    receipt = _put_objects(shard, block, seconds, versions or {})
    location = shard.fragment.location
    if not create_record(location, shard.receipt_key, receipt, "lower encode.shard_rows: its bad rows are too many"):
        other = shard.find_receipt()  # another writer finished it meanwhile, with the same objects
        if other is None:
            raise StorageError(f"{location.uri}/{shard.receipt_key}: appeared and disappeared; find what deletes there")
        return other
    return receipt


def _prepare(
    shard: Shard,
    latents: np.ndarray,
    psnr: np.ndarray,
    sha256: np.ndarray,
    good: np.ndarray,
    reasons: Mapping[int, str],
) -> _Block:
    finite = np.isfinite(latents).reshape(len(latents), -1).all(1) & ~np.isnan(psnr) & (psnr > -np.inf)
    bad = {int(row): reasons.get(int(row), "unreadable") for row in np.flatnonzero(~good)}
    bad |= {int(row): "diverged" for row in np.flatnonzero(good & ~finite)}
    visible = good & finite
    z: np.ndarray = np.asarray(latents, np.float32)
    if not visible.all():
        z = np.where(visible[:, None, None, None], z, np.float32(np.nan))
    clipped = 0
    quantizer = shard.fragment.quantizer
    if quantizer is not None:
        if visible.all():  # a selection would copy them
            z, clipped = quantizer.encode(z)
        else:
            codes = np.zeros(z.shape, np.uint8)
            codes[visible], clipped = quantizer.encode(z[visible])
            z = codes
    table = shard.table()
    arrays = {
        "psnr": np.where(visible, psnr, np.nan).astype(np.float32),  # NaN is what marks a bad row in the objects
        "label": table.labels,
        "id": row_ids(table.keys),
        "augmentation": table.augmentations,
        "source_sha256": np.asarray(sha256, np.uint8),
        "z": z,
    }
    return _Block(arrays, bad, clipped)


def _put_objects(shard: Shard, block: _Block, seconds: float, versions: dict[str, str]) -> Receipt:
    """Create every object; the receipt then describes what is stored, whoever wrote it."""

    def moments_without(bad: dict[int, str], z: np.ndarray) -> bytes:
        return moments_of(shard.fragment.dequantized(np.delete(z, list(bad), 0) if bad else z)).to_bytes()

    *columns, last = shard.fragment.plan.arrays
    # Threads: every object waits for the disk on its own, and z's moments are computed meanwhile. Not over a network:
    # every thread would open connections of its own, which takes longer than it saves.
    # z itself begins when the others are stored: where it is adopted, so is the PSNR that marks its bad rows.
    with ThreadPoolExecutor(len(columns)) as threads:
        side_by_side = threads.map if isinstance(shard.fragment.location, LocalLocation) else map
        each = side_by_side(lambda name: _put_array(shard, name, block.arrays[name]), columns)
        stored = dict(zip(columns, each, strict=True))
        ahead = threads.submit(moments_without, block.bad, block.arrays[last])
        stored[last] = _put_array(shard, last, block.arrays[last])
    arrays = {name: each.rows for name, each in stored.items()}
    bad = _bad_rows(block, arrays)
    visible = np.array([row not in bad for row in range(shard.size)])
    same = arrays[last] is block.arrays[last] and bad.keys() == block.bad.keys()
    moments = _put_moments(shard, ahead.result() if same else moments_without(bad, arrays[last]))
    return Receipt(
        fragment=shard.fragment.id, shard=shard.number, rows=len(visible), bad=bad,
        objects={each.key: each.record for each in stored.values()} | {moments_name(shard.number): vouch(moments)},
        content=content_of(shard.fragment.split, {name: arrays[name][visible] for name in IDENTITY}),
        psnr=PsnrSummary.of(arrays["psnr"][visible]), clipped=block.clipped, seconds=round(seconds, 3),
        versions=versions,
    )  # fmt: skip


def _put_array(shard: Shard, name: str, array: np.ndarray) -> _Stored:
    """Create one array's object, or adopt the one that exists."""
    fragment = shard.fragment
    below, data = encode(fragment.document(name), fragment.plan.arrays[name], array, shard.number)
    key = f"{name}/{below}"
    if not fragment.location.create(f"{fragment.plan.path}/{key}", data):
        existing = fragment.location.read(f"{fragment.plan.path}/{key}")
        if existing != data:
            # By a writer killed before its receipt, with another environment's rounding: valid, so it stays.
            return _Stored(shard.decoded(name, existing), key, vouch(existing))
    return _Stored(array, key, vouch(data))


def _bad_rows(block: _Block, stored: dict[str, np.ndarray]) -> dict[int, str]:
    """Return the rows that the stored objects mark as bad; with the latents of this call, this call's bad rows too."""
    marked = np.isnan(stored["psnr"])
    if stored["z"] is not block.arrays["z"] and stored["z"].dtype.kind == "f":
        marked |= ~np.isfinite(stored["z"]).all((1, 2, 3))
    if stored["z"] is block.arrays["z"]:
        marked[list(block.bad)] = True  # their codes are 0, whatever PSNR an adopted object has for them
    unknown = "unreadable or diverged when it was first encoded"
    return {int(row): block.bad.get(int(row), unknown) for row in np.flatnonzero(marked)}


def _put_moments(shard: Shard, moments: bytes) -> bytes:
    """Create the moments' object, or adopt one without a receipt: it belongs to the same z, adopted before it."""
    location, key = shard.fragment.location, f"{shard.fragment.plan.path}/{moments_name(shard.number)}"
    if location.create(key, moments):
        return moments
    existing = location.read(key)
    if len(existing) != len(moments) or not np.allclose(np.frombuffer(existing), np.frombuffer(moments), rtol=1e-6):
        raise DamagedObject(f"{location.uri}/{key}: is not of this shard, and no receipt records it; delete it")
    return existing
