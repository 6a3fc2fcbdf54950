"""Committed fragments: their plan, receipts, visible rows and arrays."""

from collections.abc import Container, Iterator
from dataclasses import dataclass

import numpy as np

from functa.storage.errors import DamagedObject, MissingObject, StorageError
from functa.storage.functaset.history import CommittedFragment
from functa.storage.functaset.moments import Moments
from functa.storage.functaset.plan import (
    Name,
    Plan,
    array_document,
    array_specs,
    plan_rows,
    row_id,
)
from functa.storage.functaset.quantizer import Quantizer
from functa.storage.functaset.records import (
    ObjectRecord,
    read_vouched,
    unseal,
)
from functa.storage.functaset.shard import Receipt, decoded, moments_key, read_receipt, receipt_key
from functa.storage.functaset.zarr_bytes import chunk_key
from functa.storage.places.local import may_pass
from functa.storage.places.location import Location


def committed_plan(location: Location, entry: CommittedFragment) -> Plan:
    """The plan that was committed. Raises MissingObject or DamagedObject if another one stands there now."""
    key = f"fragments/{entry.fragment}/plan.json"
    plan = unseal(read_vouched(location, key, entry.plan), f"{location.uri}/{key}", Plan)
    same = (plan.id, plan.split, plan.shards) == (entry.fragment, entry.split, len(entry.receipts))
    if not same or (entry.retired and entry.retired[-1][1] > plan.rows):
        raise DamagedObject(f"{location.uri}/{key}: is not what was committed; restore it from a copy")
    return plan


def committed_receipt(location: Location, entry: CommittedFragment, plan: Plan, shard: int) -> Receipt:
    """The receipt that was committed. Raises MissingObject or DamagedObject."""
    read_vouched(location, receipt_key(plan, shard), entry.receipts[shard])
    receipt = read_receipt(location, plan, shard)
    if receipt is None:
        raise MissingObject(f"{location.uri}/{receipt_key(plan, shard)}: is missing; restore it from a copy")
    return receipt


def live_shards(entry: CommittedFragment, plan: Plan) -> list[int]:
    """Shards that still hold a row which is not retired."""
    return [shard for shard in range(plan.shards) if not retired_rows(entry, plan, shard).all()]


def retired_rows(entry: CommittedFragment, plan: Plan, shard: int) -> np.ndarray:
    """bool [rows of the shard]."""
    begin = shard * plan.shard_rows
    retired = np.zeros(plan.shard_size(shard), bool)
    for start, stop in entry.retired:
        retired[max(0, start - begin) : max(0, stop - begin)] = True
    return retired


def row_names(location: Location, entry: CommittedFragment, plan: Plan, shard: int) -> list[Name]:
    """Names of a shard's rows, from its table of keys or, where that is damaged, from the columns."""
    try:
        return plan_rows(location, plan, shard).names
    except StorageError as error:
        if may_pass(location, error):
            raise
        receipt = committed_receipt(location, entry, plan, shard)
        ids, numbers = (read_array(location, plan, receipt, name) for name in ("id", "augmentation"))
        return [(bytes(row), int(number)) for row, number in zip(ids, numbers, strict=True)]


def visible_rows(entry: CommittedFragment, plan: Plan, receipt: Receipt) -> np.ndarray:
    """bool [rows of the shard]: neither bad nor retired."""
    visible = ~retired_rows(entry, plan, receipt.shard)
    visible[list(receipt.bad)] = False
    return visible


def visible_keys(
    location: Location, entry: CommittedFragment, plan: Plan, without: Container[int] = ()
) -> Iterator[tuple[int, str, int]]:
    """(row within the fragment, key, augmentation) of every row that readers see, `without` some shards."""
    for shard in (shard for shard in live_shards(entry, plan) if shard not in without):
        visible = visible_rows(entry, plan, committed_receipt(location, entry, plan, shard))
        table = plan_rows(location, plan, shard)
        for row in np.flatnonzero(visible):
            yield shard * plan.shard_rows + int(row), table.keys[row], int(table.augmentations[row])


def visible_names(location: Location, entry: CommittedFragment, plan: Plan) -> dict[Name, str]:
    """Name -> key of every row that readers see of this fragment."""
    return {(row_id(key), number): key for _, key, number in visible_keys(location, entry, plan)}


def read_array(
    location: Location, plan: Plan, receipt: Receipt, name: str, document: bytes | None = None
) -> np.ndarray:
    """One array's rows of a finished shard, bytes checked against the receipt. Raises MissingObject, DamagedObject.

    `document` is the array's zarr.json where the caller has read it already (array_document).
    """
    spec = array_specs(plan)[name]
    key, record = array_object(location, plan, receipt, name)
    if document is None:
        document = array_document(location, plan, name, spec)
    data = read_vouched(location, f"{plan.path}/{key}", record)
    return decoded(location, plan, document, spec, key, data, receipt.shard, vouched=True)


def array_object(location: Location, plan: Plan, receipt: Receipt, name: str) -> tuple[str, ObjectRecord]:
    """(key below the fragment, record) of the object that holds a shard's rows of one array. Raises DamagedObject."""
    key = f"{name}/{chunk_key(array_specs(plan)[name], receipt.shard)}"
    if key not in receipt.objects:
        raise DamagedObject(f"{location.uri}/{receipt_key(plan, receipt.shard)}: does not name {key}")
    return key, receipt.objects[key]


def read_moments(location: Location, plan: Plan, receipt: Receipt) -> Moments:
    """Latent moments of a shard's good rows, checked against the receipt."""
    key = moments_key(receipt.shard)
    if key not in receipt.objects or receipt.objects[key].bytes != 16 * plan.dims:
        raise DamagedObject(f"{location.uri}/{receipt_key(plan, receipt.shard)}: does not name {key} in full")
    data = read_vouched(location, f"{plan.path}/{key}", receipt.objects[key])
    return Moments.from_bytes(data, receipt.good, plan.latent_shape)


@dataclass(frozen=True)
class Shard:
    """One shard with rows to show. `places` int64 [n] are the visible rows within it, or those `chosen` of them."""

    location: Location
    entry: CommittedFragment
    plan: Plan
    receipt: Receipt
    rows: int  # visible ones, or those chosen
    which: int  # number of the quantiser among the split's
    quantizer: Quantizer | None
    chosen: np.ndarray | None = None

    @property
    def name(self) -> str:
        """Of the shard, in errors."""
        return f"{self.location.uri}/{self.plan.path}, shard {self.receipt.shard}"

    @property
    def places(self) -> np.ndarray:
        """int64 [n]: the visible rows within the shard; worked out at each call, so that no list of rows is kept."""
        if self.chosen is not None:
            return self.chosen
        return np.flatnonzero(visible_rows(self.entry, self.plan, self.receipt))

    def object(self, array: str) -> tuple[str, ObjectRecord]:
        """(key within the store, record) of one array's object."""
        key, record = array_object(self.location, self.plan, self.receipt, array)
        return f"{self.plan.path}/{key}", record
