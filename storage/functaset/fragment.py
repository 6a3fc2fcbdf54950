"""Fragments bound to their location: plan, quantiser, shards; and of each shard its receipt, rows and arrays.

Every byte that is read is checked: the plan against the commit's entry, tables and ranges against the plan, receipts
against the entry, arrays against the receipt.
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from functa.storage.errors import DamagedObject, MissingObject, StorageError
from functa.storage.functaset.history import Commit, FragmentEntry
from functa.storage.functaset.plan import TABLE_BYTES, TABLES, Name, Plan, RowTable, fragment_path, rows_name
from functa.storage.functaset.quantizer import Quantizer
from functa.storage.functaset.receipts.manifest import Manifest, manifest_key
from functa.storage.functaset.receipts.moments import Moments
from functa.storage.functaset.receipts.receipt import Receipt, moments_name, receipt_name
from functa.storage.functaset.records import ObjectRecord, read_record, read_vouched, unseal, vouch
from functa.storage.functaset.zarr_bytes import ArraySpec, check_document, chunk_key, decode, decode_vouched
from functa.storage.places.address import MAX_JSON_BYTES
from functa.storage.places.local import may_pass
from functa.storage.places.location import Location, checked_key
from functa.storage.places.side_by_side import side_by_side


@dataclass(frozen=True, eq=False)
class Fragment:
    """The shards of one encoding run of one split, at their location.

    entry: what a commit records of it; None for one that is read as planned, of which no row is retired and whose
    receipts nothing vouches for. Older commits record every receipt, newer ones a manifest that holds them all.
    """

    location: Location
    plan: Plan
    entry: FragmentEntry | None = None

    @classmethod
    def load(cls, location: Location, fragment: str) -> "Fragment":
        """Return a fragment as planned. Raises MissingObject or DamagedObject."""
        key = checked_key(f"{fragment_path(fragment)}/plan.json")
        plan = read_record(location, key, Plan)
        if plan.id != fragment:
            raise DamagedObject(f"{location.uri}/{key}: is the plan of fragment {plan.id}; it was moved")
        _check_tables(f"{location.uri}/{key}", plan)
        return cls(location, plan)

    @classmethod
    def committed(cls, location: Location, entry: FragmentEntry) -> "Fragment":
        """Return a fragment as committed. Raises MissingObject or DamagedObject where the plan is another now."""
        key = f"{fragment_path(entry.fragment)}/plan.json"
        plan = unseal(read_vouched(location, key, entry.plan), f"{location.uri}/{key}", Plan)
        same = (plan.id, plan.split) == (entry.fragment, entry.split)
        same = same and (entry.manifest is not None or plan.shards == len(entry.receipts))
        if not same or (entry.retired and entry.retired[-1][1] > plan.rows):
            raise DamagedObject(f"{location.uri}/{key}: is not what was committed; restore it from a copy")
        _check_tables(f"{location.uri}/{key}", plan)
        return cls(location, plan, entry)

    @property
    def id(self) -> str:
        """24 hex digits that name it in the functaset."""
        return self.plan.id

    @property
    def split(self) -> str:
        """The split that all its rows belong to."""
        return self.plan.split

    @property
    def name(self) -> str:
        """Its full address, for messages."""
        return f"{self.location.uri}/{self.plan.path}"

    @cached_property
    def shards(self) -> "list[Shard]":
        """All its shards in order."""
        if TABLES in self.plan.objects and len(self._tables) != self.plan.shards:
            raise DamagedObject(f"{self.name}/{TABLES}: is not of {self.plan.shards} shards; restore it from a copy")
        return [Shard(self, number) for number in range(self.plan.shards)]

    @cached_property
    def live(self) -> "list[Shard]":
        """Shards that still hold a row which is not retired. Of the others nothing needs to be readable."""
        if not self.retired_ranges.size:
            return self.shards
        whole = np.full(self.plan.shards, self.plan.shard_rows)
        whole[-1] = self.plan.shard_size(self.plan.shards - 1)
        return [self.shards[number] for number in np.flatnonzero(self.retired_counts < whole).tolist()]

    @cached_property
    def retired_counts(self) -> np.ndarray:
        """int64 [shards]: retired rows of each shard."""
        edges = self.plan.shard_rows * np.arange(self.plan.shards + 1)
        return np.diff(_covered(self.retired_ranges, edges))

    @cached_property
    def retired_ranges(self) -> np.ndarray:
        """int64 [n, 2]: (start, stop) of retired rows, in order."""
        return np.array(self.entry.retired if self.entry else (), np.int64).reshape(-1, 2)

    @cached_property
    def manifest(self) -> Manifest | None:
        """The manifest that its commit names; None before the commit, or of a commit that names every receipt."""
        if self.entry is None or self.entry.manifest is None:
            return None
        key = manifest_key(self.id)
        return Manifest.from_bytes(
            read_vouched(self.location, key, self.entry.manifest), self.plan, f"{self.location.uri}/{key}"
        )

    @property
    def receipt_records(self) -> "list[ObjectRecord]":
        """Lengths and sha256 of the receipts of a committed fragment."""
        assert self.entry is not None
        if self.manifest is None:
            return list(self.entry.receipts)
        return [self.manifest.receipt_record(number) for number in range(self.plan.shards)]

    def table_record(self, shard: int) -> ObjectRecord:
        """Return length and sha256 of a shard's table. Raises MissingObject or DamagedObject."""
        if TABLES not in self.plan.objects:
            return self._planned(rows_name(shard))
        row = self._tables[shard].tobytes()
        return ObjectRecord(bytes=int.from_bytes(row[:8], "little"), sha256=row[8:].hex())

    @cached_property
    def _tables(self) -> np.ndarray:
        return np.frombuffer(self.planned_object(TABLES), np.uint8).reshape(-1, TABLE_BYTES)

    @cached_property
    def quantizer(self) -> Quantizer | None:
        """Its quantiser, None for float32 latents. Raises MissingObject or DamagedObject."""
        chosen = self.plan.quantization
        if chosen is None:
            return None
        low, step = (
            decode(
                self._document(f"quantization/{name}", chosen.range_spec),
                chosen.range_spec,
                self.planned_object(f"quantization/{name}/c/0/0/0"),
            )
            for name in ("low", "step")
        )
        return Quantizer(chosen.bits, low, step, chosen.policy, chosen.candidates)

    def dequantized(self, z: np.ndarray) -> np.ndarray:
        """Return stored latents [n, s, s, c], codes or not, as float32."""
        return self.quantizer.decode(z) if self.quantizer else z

    def document(self, array: str) -> bytes:
        """Return a row array's zarr.json, equal to the plan's record and to what the plan's numbers demand.

        Read once: over a network every shard would ask for it again. Raises MissingObject or DamagedObject.
        """
        if array not in self._documents:
            self._documents[array] = self._document(array, self.plan.arrays[array])
        return self._documents[array]

    @cached_property
    def _documents(self) -> dict[str, bytes]:
        return {}

    def _document(self, array: str, spec: ArraySpec) -> bytes:
        document = self.planned_object(f"{array}/zarr.json")
        try:
            check_document(document, spec)
        except DamagedObject as error:
            raise DamagedObject(f"{self.name}/{array}/zarr.json: {error}; restore it from a copy") from None
        return document

    def planned_object(self, key: str) -> bytes:
        """Return an object of the plan, checked against it. Raises MissingObject or DamagedObject."""
        return read_vouched(self.location, f"{self.plan.path}/{key}", self._planned(key))

    def _planned(self, key: str) -> ObjectRecord:
        if key not in self.plan.objects:
            raise DamagedObject(f"{self.name}/plan.json: does not name {key}; restore it from a copy")
        return self.plan.objects[key]

    def visible_keys(self, without: Container[int] = ()) -> Iterator[tuple[int, str, int]]:
        """Yield (row within the fragment, key, augmentation) of every visible row, `without` some shards."""
        shards = [shard for shard in self.live if shard.number not in without]
        for shard, table in zip(shards, side_by_side(self.location, Shard.table, shards), strict=True):
            for row in np.flatnonzero(shard.visible).tolist():
                yield shard.first + row, table.keys[row], int(table.augmentations[row])


@dataclass(frozen=True, eq=False)
class Shard:
    """One shard of a fragment. chosen: rows within it to be read; None for all that are visible."""

    fragment: Fragment
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
        check_rows(self.name, columns.get("z"), columns["augmentation"])
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


def check_rows(name: str, z: np.ndarray | None, augmentation: np.ndarray | None = None) -> None:
    """Check what a receipt forged together with its objects could still get wrong. Raises DamagedObject."""
    finite = z is None or z.dtype.kind != "f" or np.isfinite(z).all()
    if not finite or (augmentation is not None and (augmentation < 0).any()):
        raise DamagedObject(f"{name}: visible rows are not finite; restore it from a copy")


def shown_fragments(location: Location, commit: Commit | None, split: str | None = None) -> Iterator[Fragment]:
    """Yield the fragments that a commit shows, of one split or of all. Raises MissingObject or DamagedObject."""
    entries = [entry for entry in (commit.fragments if commit else ()) if split in (None, entry.split)]
    yield from side_by_side(location, lambda entry: Fragment.committed(location, entry), entries)


def _check_tables(name: str, plan: Plan) -> None:
    """Raise DamagedObject for a plan that claims more shards than it has tables."""
    records = plan.objects.get(TABLES)
    whole = plan.shards <= len(plan.objects) if records is None else records.bytes == TABLE_BYTES * plan.shards
    if not whole:
        raise DamagedObject(f"{name}: names no rows of its {plan.shards} shards; restore it")


def _covered(ranges: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return how many rows below each edge lie in the ranges."""
    if not len(ranges):
        return np.zeros(len(edges), np.int64)
    lengths = np.r_[0, np.cumsum(ranges[:, 1] - ranges[:, 0])]
    last = np.searchsorted(ranges[:, 0], edges)  # ranges that begin below it
    beyond = np.maximum(0, ranges[np.maximum(last - 1, 0), 1] - edges)
    return np.asarray(lengths[last] - np.where(last > 0, beyond, 0))
