"""Commits say what is visible: create-only, numbered, each with its parent, its own checksum and its receipts'.

    commits/00000001.json     Commit, sealed
    commits/00000001.sha256   of that file's bytes, made right after it: a newest commit that is lost or forged shows

Readers trust commits alone. Of a shard whose rows are all retired nothing is read or checked any more. The number of
a version that was given up stays taken: a committer that was held up must find that it lost.
"""

import hashlib
from collections.abc import Container, Iterable, Iterator
from functools import cached_property
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from storage.errors import DamagedObject, MissingObject, StorageError
from storage.fragments import Receipt, read_array, read_receipt, receipt_key
from storage.local import may_pass
from storage.locations import MAX_JSON_BYTES, Location
from storage.plans import Name, Plan, plan_rows, row_id
from storage.records import FORMAT, ObjectRecord, Record, read_vouched, unseal

MARK_BYTES = 100
GIVEN_UP = b"given up\n"  # in the place of a commit
Ranges = tuple[tuple[int, int], ...]  # (start, stop), sorted and apart


class CommittedFragment(Record):
    """A visible fragment: its plan and receipts as they were when it was committed, and its retired rows."""

    fragment: str
    split: Literal["train", "test"]
    rows: int = Field(ge=0)  # visible ones: planned, less bad, less retired
    bad: int = Field(ge=0)  # less those retired
    retired: Ranges  # rows within the fragment
    plan: ObjectRecord
    receipts: tuple[ObjectRecord, ...]  # of shard 0, 1, ...

    @model_validator(mode="after")
    def _in_order(self) -> "CommittedFragment":
        edges = [edge for part in self.retired for edge in part]
        if edges != sorted(set(edges)) or min(edges, default=0) < 0:
            raise ValueError("retired rows are not ranges in order")
        return self


class TrainingMoments(Record):
    """Where the training split's moments stand."""

    key: str
    count: int = Field(ge=0)
    latent_shape: tuple[int, int, int]
    object: ObjectRecord


class Commit(Record):
    """What is visible. `objects` are the functaset's own: the root document and the field."""

    format: Literal[1] = FORMAT
    version: int = Field(ge=1)
    oldest: int = Field(ge=1)  # earlier versions were given up, so that their data could go
    parent: str | None  # sha256 of the parent commit's bytes
    fingerprint: str
    fragments: tuple[CommittedFragment, ...]
    withdrawn: tuple[str, ...] = ()  # fragments that were visible: retired as a whole, or replaced; none comes back
    barred: tuple[str, ...] = ()  # ids of images that were retired by name, until their rows are erased
    moments: TrainingMoments | None
    objects: dict[str, ObjectRecord]

    def bars(self, key: str) -> bool:
        """Whether the image was retired by name, so that no encoding of its source brings it back, in any split."""
        return row_id(key).hex() in self._barred

    @cached_property
    def _barred(self) -> frozenset[str]:
        return frozenset(self.barred)


def latest(location: Location) -> Commit | None:
    """The newest commit, None where nothing is committed. Raises DamagedObject if it was altered or is missing."""
    found = versions(location)
    try:
        return load_commit(location, found[-1]) if found else None
    except DamagedObject as error:
        if len(found) == 1:
            raise
        raise DamagedObject(f"{error}; older versions are read by Functaset.open(uri, version=N)") from None


def load_commit(location: Location, version: int) -> Commit:
    """Raises MissingObject (naming the versions that there are) or DamagedObject."""
    name = f"{location.uri}/{commit_key(version)}"
    mark = _mark_of(location, version)
    try:
        data = location.read(commit_key(version), limit=MAX_JSON_BYTES)
    except MissingObject:
        if mark is not None:
            raise DamagedObject(f"{name}: is missing; restore it from a copy") from None
        raise MissingObject(f"{location.uri}: has no version {version}; {_known(location)}") from None
    if data == GIVEN_UP:
        raise MissingObject(f"{location.uri}: version {version} was given up; {_known(location)}")
    commit = unseal(data, name, Commit)
    if commit.version != version:
        raise DamagedObject(f"{name}: is version {commit.version}; it was renamed")
    if mark not in (None, hashlib.sha256(data).hexdigest()):
        raise DamagedObject(f"{name}: is not the one that was committed; restore it and its .sha256 from a copy")
    return commit


def _known(location: Location) -> str:
    found = versions(location)
    newest = load_commit(location, found[-1]) if found else None
    kept = [str(version) for version in found if newest is not None and version >= newest.oldest]
    return f"versions: {', '.join(kept) or 'none'}"


def _mark_of(location: Location, version: int) -> str | None:
    """None where there is none: the commit's writer may have been killed before it."""
    try:
        return location.read(mark_key(version), limit=MARK_BYTES).decode(errors="replace").strip()
    except MissingObject:
        return None


def commit_key(version: int) -> str:
    """Where a commit stands."""
    return f"commits/{version:08d}.json"


def mark_key(version: int) -> str:
    """Where its bytes' sha256 stands."""
    return f"commits/{version:08d}.sha256"


def versions(location: Location) -> list[int]:
    """All that commits or their marks speak of, those that were given up too, sorted."""
    names = (key.removeprefix("commits/").rpartition(".") for key in location.list("commits/"))
    return sorted({int(stem) for stem, _, end in names if stem.isdecimal() and end in ("json", "sha256")})


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


def as_ranges(rows: Iterable[int]) -> Ranges:
    """Rows as (start, stop), sorted and apart."""
    numbers = np.unique(np.fromiter(rows, np.int64))
    if len(numbers) == 0:
        return ()
    breaks = np.flatnonzero(np.diff(numbers) != 1)
    starts, ends = numbers[np.r_[0, breaks + 1]], numbers[np.r_[breaks, len(numbers) - 1]]
    return tuple((int(start), int(end) + 1) for start, end in zip(starts, ends, strict=True))


def as_rows(ranges: Ranges) -> list[int]:
    """The inverse of as_ranges."""
    return [row for start, stop in ranges for row in range(start, stop)]
