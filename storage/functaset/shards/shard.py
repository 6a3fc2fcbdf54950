"""Shards: of each its receipt, rows and arrays, checked against the commit of its fragment whenever they are read."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from functa.storage.errors import DamagedObject, MissingObject, StorageError
from functa.storage.functaset.plan import Name, RowTable, rows_name
from functa.storage.functaset.receipts.moments import Moments
from functa.storage.functaset.receipts.receipt import Receipt, moments_name, receipt_name
from functa.storage.functaset.records import ObjectRecord, read_vouched, unseal, vouch
from functa.storage.functaset.zarr_bytes import chunk_key, decode, decode_vouched
from functa.storage.places.address import MAX_JSON_BYTES
from functa.storage.places.local import may_pass

if TYPE_CHECKING:
    from functa.storage.functaset.fragment import Fragment


@dataclass(frozen=True, eq=False)
class Shard:
    """One shard of a fragment. chosen: rows within it to be read; None for all that are visible."""

    fragment: "Fragment"
    number: int
    chosen: np.ndarray | None = None

    @property
    def name(self) -> str:
        """The shard in messages."""
        return f"{self.fragment.name}, shard {self.number}"

    @property
    def size(self) -> int:
        """Rows stored, bad and retired ones too."""
        return self.fragment.plan.shard_size(self.number)

    @property
    def first(self) -> int:
        """Number of its first row within the fragment."""
        return self.number * self.fragment.plan.shard_rows

    @property
    def receipt_key(self) -> str:
        """The receipt's key in the functaset."""
        return f"{self.fragment.plan.path}/{receipt_name(self.number)}"

    def find_receipt(self) -> Receipt | None:
        """Return the receipt, None where there is none. Raises DamagedObject for an altered or misplaced one."""
        found = self.find_stored()
        return found and found[0]

    def find_stored(self) -> tuple[Receipt, ObjectRecord] | None:
        """Return the receipt with length and sha256 of its own object, as find_receipt."""
        try:
            data = self.fragment.location.read(self.receipt_key, MAX_JSON_BYTES)
        except MissingObject:
            return None
        return self._checked(data), vouch(data)

    @property
    def receipt(self) -> Receipt:
        """The receipt, as it was committed where it was. Raises MissingObject or DamagedObject."""
        manifest = self.fragment.manifest
        return self.stored_receipt if manifest is None else manifest.receipt(self.number)

    @cached_property
    def stored_receipt(self) -> Receipt:
        """The receipt as its own object holds it. Raises MissingObject or DamagedObject."""
        location, entry, manifest = self.fragment.location, self.fragment.entry, self.fragment.manifest
        if entry is None:
            return self._checked(location.read(self.receipt_key, MAX_JSON_BYTES))
        record = entry.receipts[self.number] if manifest is None else manifest.receipt_record(self.number)
        return self._checked(read_vouched(location, self.receipt_key, record))

    def _checked(self, data: bytes) -> Receipt:
        name = f"{self.fragment.location.uri}/{self.receipt_key}"
        receipt = unseal(data, name, Receipt)
        placed = (receipt.fragment, receipt.shard, receipt.rows) == (self.fragment.id, self.number, self.size)
        if not placed or any(not 0 <= row < receipt.rows for row in receipt.bad):
            raise DamagedObject(f"{name}: is not this shard's receipt; restore it from a copy")
        return receipt

    @property
    def retired(self) -> np.ndarray:
        """bool [size]: rows that a commit hides."""
        retired, ranges = np.zeros(self.size, bool), self.fragment.retired_ranges - self.first
        for start, stop in ranges[np.searchsorted(ranges[:, 1], 0, "right") : np.searchsorted(ranges[:, 0], self.size)]:
            retired[max(0, start) : stop] = True
        return retired

    @property
    def bad(self) -> np.ndarray:
        """int64 [n]: rows that could not be encoded, retired ones too."""
        manifest = self.fragment.manifest
        return np.array(sorted(self.receipt.bad), np.int64) if manifest is None else manifest.bad_rows(self.number)

    @property
    def content(self) -> str:
        """The content of all its good rows, retired ones too, as `content_of`."""
        manifest = self.fragment.manifest
        return self.receipt.content if manifest is None else manifest.content(self.number)

    @property
    def visible(self) -> np.ndarray:
        """bool [size]: rows that are neither bad nor retired."""
        visible = ~self.retired
        visible[self.bad] = False
        return visible

    @property
    def rows(self) -> np.ndarray:
        """int64 [n]: rows within the shard to be read; computed at each call, so that no list of rows is kept."""
        return np.flatnonzero(self.visible) if self.chosen is None else self.chosen

    @cached_property
    def count(self) -> int:
        """Number of rows to be read."""
        return int(self.visible.sum()) if self.chosen is None else len(self.chosen)

    def table(self) -> RowTable:
        """Read keys, labels and tokens of all its rows. Raises ValueError outside the plan, DamagedObject."""
        size, key = self.size, rows_name(self.number)
        fragment = self.fragment
        data = read_vouched(fragment.location, f"{fragment.plan.path}/{key}", fragment.table_record(self.number))
        try:
            table = RowTable.from_bytes(data)
            if len(table) == size:
                return table
        except ValueError:
            pass
        raise DamagedObject(f"{self.fragment.name}/{key}: has another number of rows than the plan")

    def names(self) -> list[Name]:
        """Return the names of all its rows, from its table or, where that is damaged, from the columns."""
        try:
            return self.table().names
        except StorageError as error:
            if may_pass(self.fragment.location, error):
                raise
            ids, numbers = self.array("id"), self.array("augmentation")
            return [(bytes(row), int(number)) for row, number in zip(ids, numbers, strict=True)]

    def object(self, array: str) -> tuple[str, ObjectRecord]:
        """Return (key in the functaset, record) of one array's object. Raises DamagedObject."""
        key = f"{array}/{chunk_key(self.fragment.plan.arrays[array], self.number)}"
        manifest = self.fragment.manifest
        record = _named(self, self.receipt, key) if manifest is None else manifest.array_record(self.number, array)
        return f"{self.fragment.plan.path}/{key}", record

    def array(self, name: str) -> np.ndarray:
        """Read one array's rows [size, ...], checked against the receipt. Raises MissingObject or DamagedObject."""
        return self.decoded(name, read_vouched(self.fragment.location, *self.object(name)), vouched=True)

    def columns(self, *names: str) -> dict[str, np.ndarray]:
        """Read `rows` of some arrays, name -> [n, ...]. Raises as `array`, and where visible latents are not finite."""
        rows = self.rows
        found = {name: self.array(name) for name in dict.fromkeys((*names, "augmentation"))}
        columns = {name: column if len(rows) == len(column) else column[rows] for name, column in found.items()}
        check_values(self.name, columns.get("z"), columns["augmentation"])
        return columns

    def decoded(self, array: str, data: bytes, vouched: bool = False) -> np.ndarray:
        """Decode an array's object. vouched: a receipt records its bytes. Raises DamagedObject naming it."""
        spec, document = self.fragment.plan.arrays[array], self.fragment.document(array)
        try:
            return (decode_vouched if vouched else decode)(document, spec, data, self.number)
        except DamagedObject as error:
            name = f"{self.fragment.name}/{array}/{chunk_key(spec, self.number)}"
            raise DamagedObject(
                f"{name}: {error}; delete it if no receipt names it, else restore it from a copy"
            ) from None

    def moments(self) -> Moments:
        """Read latent moments of the good rows, retired ones included, checked against the receipt."""
        manifest = self.fragment.manifest
        if manifest is None:
            return self.moments_of(self.receipt)
        return self._moments(manifest.moments_record(self.number), self.size - len(self.bad))

    def moments_of(self, receipt: Receipt) -> Moments:
        """Read the latent moments that a receipt of this shard names."""
        return self._moments(_named(self, receipt, moments_name(self.number)), receipt.good)

    def _moments(self, record: ObjectRecord, count: int) -> Moments:
        fragment, key = self.fragment, moments_name(self.number)
        if record.bytes != 16 * fragment.plan.dims:
            raise _not_in_full(self, key)
        data = read_vouched(fragment.location, f"{fragment.plan.path}/{key}", record)
        return Moments.from_bytes(data, count, fragment.plan.latent_shape)


def _named(shard: Shard, receipt: Receipt, key: str) -> ObjectRecord:
    record = receipt.objects.get(key)
    if record is None:
        raise _not_in_full(shard, key)
    return record


def _not_in_full(shard: Shard, key: str) -> DamagedObject:
    return DamagedObject(f"{shard.fragment.location.uri}/{shard.receipt_key}: does not name {key} in full")


def check_values(name: str, z: np.ndarray | None, augmentation: np.ndarray | None = None) -> None:
    """Check what a receipt forged together with its objects could still get wrong. Raises DamagedObject."""
    finite = z is None or z.dtype.kind != "f" or np.isfinite(z).all()
    if not finite or (augmentation is not None and (augmentation < 0).any()):
        raise DamagedObject(f"{name}: visible rows are not finite; restore it from a copy")
