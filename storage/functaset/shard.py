"""Shards: written whole, one create-only object per array, then the receipt, which alone makes them count.

A task that runs twice changes nothing: what stands and is whole is adopted. So there are no leases, and a writer
that wakes up late finds its shard done.

    fragments/<id>/<array>/c/<shard>/0...    one object per array and shard
    fragments/<id>/moments/<shard>.f8        latent moments of the shard's good rows
    fragments/<id>/receipts/<shard>.0.json   Receipt, sealed; written last

Damage is never overwritten in place: a repair is a fragment of its own.
"""

import hashlib
import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field

from functa.storage.errors import DamagedObject, MissingObject, StorageError
from functa.storage.functaset.moments import moments_of
from functa.storage.functaset.plan import (
    Plan,
    ShardRows,
    array_document,
    array_specs,
    load_quantizer,
    plan_rows,
    row_id,
)
from functa.storage.functaset.quantizer import Quantizer
from functa.storage.functaset.records import FORMAT, ObjectRecord, Record, read_record, seal, vouch
from functa.storage.functaset.zarr_bytes import ArraySpec, decode, decode_vouched, encode
from functa.storage.places.local import LocalLocation
from functa.storage.places.location import Location

log = logging.getLogger(__name__)

BINS_PER_DB = 10

IDENTITY = ("id", "label", "augmentation", "source_sha256")  # arrays that say what a row is of

CONTENT_MODULUS = 1 << 256

MAX_PSNR = 100.0  # dB; a perfect reconstruction has an infinite one


class PsnrSummary(Record):
    """PSNR of good rows: count, sum in dB, and a histogram of bin (tenths of a dB) -> rows."""

    count: int = Field(ge=0)
    sum: float
    histogram: dict[int, int]


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
        """Rows that readers see."""
        return self.rows - len(self.bad)


def content_of(split: str, identities: Mapping[str, np.ndarray]) -> str:
    """64 hex digits of a set of rows, whatever their order and shards: the sum of sha256 over the IDENTITY columns."""
    columns = [np.ascontiguousarray(identities[name]) for name in IDENTITY]
    total = 0
    for row in zip(*columns, strict=True):
        identity = split.encode() + b"".join(value.tobytes() for value in row)
        total += int.from_bytes(hashlib.sha256(identity).digest(), "little")
    return f"{total % CONTENT_MODULUS:064x}"


def sum_of_contents(contents: Iterable[str]) -> str:
    """The content of all these rows together."""
    return f"{sum(int(content, 16) for content in contents) % CONTENT_MODULUS:064x}"


def receipt_name(shard: int) -> str:
    """Where a shard's receipt stands, below the fragment."""
    return f"receipts/{shard:06d}.0.json"


def receipt_key(plan: Plan, shard: int) -> str:
    """Where a shard's receipt stands."""
    return f"{plan.path}/{receipt_name(shard)}"


def moments_key(shard: int) -> str:
    """Where a shard's moments stand, below the fragment."""
    return f"moments/{shard:06d}.f8"


def read_receipt(location: Location, plan: Plan, shard: int) -> Receipt | None:
    """The standing receipt, None where there is none. Raises DamagedObject for an altered or misplaced one."""
    key = receipt_key(plan, shard)
    try:
        receipt = read_record(location, key, Receipt)
    except MissingObject:
        return None
    placed = (receipt.fragment, receipt.shard, receipt.rows) == (plan.id, shard, plan.shard_size(shard))
    if not placed or any(not 0 <= row < receipt.rows for row in receipt.bad):
        raise DamagedObject(f"{location.uri}/{key}: is not this shard's receipt; restore it from a copy")
    return receipt


@dataclass(frozen=True)
class _Block:
    """A shard's arrays by name, row -> reason of its bad rows, and how many numbers the quantiser clipped."""

    arrays: dict[str, np.ndarray]
    bad: dict[int, str]
    clipped: int


def write_shard(
    location: Location,
    plan: Plan,
    shard: int,
    *,
    latents: np.ndarray,
    labels: np.ndarray,
    psnr: np.ndarray,
    sha256: np.ndarray,
    good: np.ndarray,
    reasons: dict[int, str],
    max_clip_fraction: float = 0.01,
    seconds: float = 0.0,
    versions: dict[str, str] | None = None,
) -> Receipt:
    """Write a whole shard, or adopt the one that stands; return its receipt.

    latents float32 [n, s, s, c], labels [n], psnr [n] in dB, sha256 uint8 [n, 32], good bool [n], reasons by row of
    the shard; n must be the shard's whole length, rows in plan_rows' order (ValueError). Rows that are not good are
    stored as NaN (code 0) and masked. A good row whose latent or PSNR is not finite is bad: 'diverged'.
    Raises StorageError: full disk, labels that are not the plan's, more clipped numbers than `max_clip_fraction`.
    """
    standing = read_receipt(location, plan, shard)
    if standing is not None:
        return standing
    rows = plan_rows(location, plan, shard)
    size = plan.shard_size(shard)
    for name, array, tail in (("latents", latents, plan.latent_shape), ("psnr", psnr, ()), ("sha256", sha256, (32,))):
        if np.shape(array) != (size, *tail):
            raise ValueError(f"{name} {np.shape(array)} is not the whole of shard {shard}: {(size, *tail)}")
    if not np.array_equal(labels, rows.labels):
        raise StorageError(f"fragment {plan.id}, shard {shard}: labels are not the plan's; did the images change?")
    quantizer = load_quantizer(location, plan)
    block = _prepare(quantizer, rows, latents, psnr, sha256, np.asarray(good, bool), reasons)
    numbers = plan.dims * max(1, size - len(block.bad))
    if block.clipped > max_clip_fraction * numbers:
        raise StorageError(
            f"fragment {plan.id}, shard {shard}: {block.clipped / numbers:.2%} of the latent numbers lie outside the "
            f"quantiser's range, more than {max_clip_fraction:.2%}; calibrate on more images or widen the range"
        )
    receipt = _put_objects(location, plan, shard, block, quantizer, seconds, versions or {})
    if not location.create(receipt_key(plan, shard), seal(receipt)):
        other = read_receipt(location, plan, shard)  # somebody finished it meanwhile, with the same objects
        if other is None:
            raise StorageError(f"{location.uri}/{receipt_key(plan, shard)}: came and went; what deletes there?")
        return other
    return receipt


def _prepare(
    quantizer: Quantizer | None,
    rows: ShardRows,
    latents: np.ndarray,
    psnr: np.ndarray,
    sha256: np.ndarray,
    good: np.ndarray,
    reasons: dict[int, str],
) -> _Block:
    finite = np.isfinite(latents).reshape(len(latents), -1).all(1) & ~np.isnan(psnr) & (psnr > -np.inf)
    bad = {int(row): reasons.get(int(row), "unreadable") for row in np.flatnonzero(~good)}
    bad |= {int(row): "diverged" for row in np.flatnonzero(good & ~finite)}
    visible = good & finite
    z: np.ndarray = np.asarray(latents, np.float32)
    if not visible.all():
        z = np.where(visible[:, None, None, None], z, np.float32(np.nan))
    clipped = 0
    if quantizer is not None:
        codes = np.zeros(z.shape, np.uint8)
        codes[visible], clipped = quantizer.encode(z[visible])
        z = codes
    arrays = {
        "psnr": np.where(visible, psnr, np.nan).astype(np.float32),  # NaN is what marks a bad row in the objects
        "label": rows.labels,
        "id": np.frombuffer(b"".join(row_id(key) for key in rows.keys), np.uint8).reshape(-1, 16),
        "augmentation": rows.augmentations,
        "source_sha256": np.asarray(sha256, np.uint8),
        "z": z,
    }
    return _Block(arrays, bad, clipped)


def _put_objects(
    location: Location,
    plan: Plan,
    shard: int,
    block: _Block,
    quantizer: Quantizer | None,
    seconds: float,
    versions: dict[str, str],
) -> Receipt:
    """Every object, create-only; the receipt then describes what stands, whoever wrote it."""

    def shown(z: np.ndarray, bad: dict[int, str]) -> bytes:
        z = np.delete(z, list(bad), 0) if bad else z
        return moments_of(quantizer.decode(z) if quantizer else z).to_bytes()

    *columns, last = array_specs(plan)
    # Threads: every object waits for the disk on its own, and z's moments are worked out meanwhile. Not over a network:
    # every thread would open connections of its own, which takes longer than it saves.
    # z itself begins when the others stand: where it is adopted, so is the PSNR that marks its bad rows.
    with ThreadPoolExecutor(len(columns)) as threads:
        side_by_side = threads.map if isinstance(location, LocalLocation) else map
        placed = list(side_by_side(lambda name: _put_array(location, plan, shard, name, block.arrays[name]), columns))
        ahead = threads.submit(shown, block.arrays[last], block.bad)
        placed.append(_put_array(location, plan, shard, last, block.arrays[last]))
    stored = {name: array for name, array, _, _ in placed}
    objects = {key: record for _, _, key, record in placed}
    bad = _bad_rows(block, stored)
    visible = np.array([row not in bad for row in range(plan.shard_size(shard))])
    same = stored[last] is block.arrays[last] and bad.keys() == block.bad.keys()
    moments = ahead.result() if same else shown(stored[last], bad)
    if not location.create(f"{plan.path}/{moments_key(shard)}", moments):
        moments = _adopt_moments(location, plan, shard, moments)
    objects[moments_key(shard)] = vouch(moments)
    return Receipt(
        fragment=plan.id, shard=shard, rows=len(visible), bad=bad, objects=objects,
        content=content_of(plan.split, {name: stored[name][visible] for name in IDENTITY}),
        psnr=_summary(stored["psnr"][visible]), clipped=block.clipped, seconds=round(seconds, 3), versions=versions,
    )  # fmt: skip


def _put_array(
    location: Location, plan: Plan, shard: int, name: str, array: np.ndarray
) -> tuple[str, np.ndarray, str, ObjectRecord]:
    """Create one array's object, or adopt the one that stands: (name, rows as they stand, key, record)."""
    spec = array_specs(plan)[name]
    document = array_document(location, plan, name, spec)
    below, data = encode(document, spec, array, shard)
    key = f"{name}/{below}"
    if not location.create(f"{plan.path}/{key}", data):
        standing = location.read(f"{plan.path}/{key}")
        if standing != data:
            # Of a writer killed before its receipt, with another environment's rounding: valid, so it stays.
            return name, decoded(location, plan, document, spec, key, standing, shard), key, vouch(standing)
    return name, array, key, vouch(data)


def _bad_rows(block: _Block, stored: dict[str, np.ndarray]) -> dict[int, str]:
    """The rows that the stored objects mark as bad; with the latents of this call, this call's bad rows too."""
    marked = np.isnan(stored["psnr"])
    if stored["z"] is not block.arrays["z"] and stored["z"].dtype.kind == "f":
        marked |= ~np.isfinite(stored["z"]).all((1, 2, 3))
    if stored["z"] is block.arrays["z"]:
        marked[list(block.bad)] = True  # their codes are 0, whatever an adopted PSNR says of them
    unknown = "unreadable or diverged when it was first encoded"
    return {int(row): block.bad.get(int(row), unknown) for row in np.flatnonzero(marked)}


def _adopt_moments(location: Location, plan: Plan, shard: int, moments: bytes) -> bytes:
    """Moments that stand without a receipt belong to the same z, which was adopted before them."""
    key = f"{plan.path}/{moments_key(shard)}"
    standing = location.read(key)
    if len(standing) != len(moments) or not np.allclose(np.frombuffer(standing), np.frombuffer(moments), rtol=1e-6):
        raise DamagedObject(f"{location.uri}/{key}: is not of this shard, and no receipt vouches for it; delete it")
    return standing


def decoded(
    location: Location,
    plan: Plan,
    document: bytes,
    spec: ArraySpec,
    key: str,
    data: bytes,
    shard: int,
    vouched: bool = False,
) -> np.ndarray:
    try:
        return (decode_vouched if vouched else decode)(document, spec, data, shard)
    except DamagedObject as error:
        name = f"{location.uri}/{plan.path}/{key}"
        raise DamagedObject(f"{name}: {error}; delete it if no receipt names it, else restore it from a copy") from None


def _summary(psnr: np.ndarray) -> PsnrSummary:
    capped = np.minimum(psnr.astype(np.float64), MAX_PSNR)
    bins, counts = np.unique(np.floor(capped * BINS_PER_DB).astype(int), return_counts=True)
    histogram = {int(b): int(n) for b, n in zip(bins, counts, strict=True)}
    return PsnrSummary(count=len(capped), sum=float(capped.sum()), histogram=histogram)
