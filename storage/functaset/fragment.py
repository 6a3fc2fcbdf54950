"""Fragments bound to their location: plan, quantiser, shards. storage/functaset/shards/shard.py has each shard's rows.

Every byte that is read is checked: the plan against the commit's entry, tables and ranges against the plan, receipts
against the entry, arrays against the receipt.
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from functa.storage.errors import DamagedObject
from functa.storage.functaset.history import Commit, FragmentEntry
from functa.storage.functaset.plan import TABLE_BYTES, TABLES, Plan, fragment_path, rows_name
from functa.storage.functaset.quantizer import Quantizer
from functa.storage.functaset.receipts.manifest import Manifest, manifest_key
from functa.storage.functaset.records import ObjectRecord, read_record, read_vouched, unseal
from functa.storage.functaset.shards.shard import Shard
from functa.storage.functaset.zarr_bytes import ArraySpec, check_document, decode
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
    def shards(self) -> list[Shard]:
        """All its shards in order."""
        if TABLES in self.plan.objects and len(self._tables) != self.plan.shards:
            raise DamagedObject(f"{self.name}/{TABLES}: is not of {self.plan.shards} shards; restore it from a copy")
        return [Shard(self, number) for number in range(self.plan.shards)]

    @cached_property
    def live(self) -> list[Shard]:
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
    def receipt_records(self) -> list[ObjectRecord]:
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
