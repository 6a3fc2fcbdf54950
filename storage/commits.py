"""Commits make fragments visible: create-only, numbered, each with its parent, its own checksum and its receipts'.

    commits/00000001.json     Commit, sealed
    moments/<digest>.f8       latent moments of the training split as of a commit

Readers trust commits alone.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

from pydantic import Field

from storage.errors import DamagedObject, MissingObject, StorageError, TransientError
from storage.fragments import Receipt, read_moments, read_receipt, receipt_key
from storage.locations import Location
from storage.moments import Moments, merge
from storage.plans import Plan, load_plan, plan_rows, row_id
from storage.records import FORMAT, ObjectRecord, Record, read_record, read_vouched, seal, unseal, vouch
from storage.root import read_root

Found = TypeVar("Found")

AUGMENTATION = 0  # the only one so far; every row carries its number


class CommittedFragment(Record):
    """A visible fragment: its plan and receipts as they were when it was committed, and its retired rows."""

    fragment: str
    split: Literal["train", "test"]
    rows: int = Field(ge=0)  # visible ones: planned, less bad, less retired
    bad: int = Field(ge=0)
    retired: tuple[int, ...]  # rows within the fragment
    plan: ObjectRecord
    receipts: tuple[ObjectRecord, ...]  # of shard 0, 1, ...


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
    parent: str | None  # sha256 of the parent commit's bytes
    fingerprint: str
    fragments: tuple[CommittedFragment, ...]
    moments: TrainingMoments | None
    objects: dict[str, ObjectRecord]


@dataclass(frozen=True)
class VerifyReport:
    """How many objects were checked, and the bad ones as {"path", "fault"}."""

    checked: int
    bad: list[dict[str, str]]


def latest(location: Location) -> Commit | None:
    """The newest commit, None where nothing is committed. Raises DamagedObject if it was altered."""
    versions = _versions(location)
    return load_commit(location, versions[-1]) if versions else None


def load_commit(location: Location, version: int) -> Commit:
    """Raises MissingObject (naming the versions that there are) or DamagedObject."""
    try:
        commit = read_record(location, _commit_key(version), Commit)
    except MissingObject:
        known = ", ".join(map(str, _versions(location))) or "none"
        raise MissingObject(f"{location.uri}: has no version {version}; versions: {known}") from None
    if commit.version != version:
        raise DamagedObject(f"{location.uri}/{_commit_key(version)}: is version {commit.version}; it was renamed")
    return commit


def commit(location: Location, fragment_ids: Sequence[str]) -> Commit:
    """Make finished fragments visible on top of the newest commit; return the commit that shows them.

    Fragments that are visible already are no change: with no others, the standing commit comes back. Of two
    committers one wins and the other commits on top. Raises StorageError: an unfinished shard, another fingerprint,
    an image that another fragment shows already.
    """
    root = read_root(location)
    while True:
        parent = latest(location)
        standing = {entry.fragment for entry in parent.fragments} if parent else set()
        new = [name for name in dict.fromkeys(fragment_ids) if name not in standing]
        if parent is not None and not new:
            return parent
        if not new:
            raise StorageError(f"{location.uri}: nothing to commit; encode first")
        entries = list(parent.fragments) if parent else []
        entries += [_entry(location, name, root.fingerprint_digest) for name in new]
        _refuse_overlap(location, entries, new)
        proposal = Commit(
            version=parent.version + 1 if parent else 1,
            parent=_digest_of(location, parent) if parent else None,
            fingerprint=root.fingerprint_digest,
            fragments=tuple(entries),
            moments=_training_moments(location, entries),
            objects=_own_objects(location, root.field),
        )
        if location.create(_commit_key(proposal.version), seal(proposal)):
            return proposal


def _commit_key(version: int) -> str:
    return f"commits/{version:08d}.json"


def _versions(location: Location) -> list[int]:
    names = (key.removeprefix("commits/").removesuffix(".json") for key in location.list("commits/"))
    return sorted(int(name) for name in names if name.isdecimal())


def _digest_of(location: Location, commit: Commit) -> str:
    return hashlib.sha256(location.read(_commit_key(commit.version))).hexdigest()


def _own_objects(location: Location, field: str) -> dict[str, ObjectRecord]:
    keys = ("zarr.json", f"fields/{field}.safetensors", f"fields/{field}.json")
    return {key: vouch(location.read(key)) for key in keys}


def _entry(location: Location, fragment_id: str, fingerprint: str) -> CommittedFragment:
    """The fragment's entry, once every shard has its receipt and every object its length."""
    plan = load_plan(location, fragment_id)
    if plan.fingerprint != fingerprint:
        raise StorageError(f"{location.uri}/{plan.path}: was planned for another fingerprint; encode it again")
    receipts = []
    records = []
    for shard in range(plan.shards):
        receipt = read_receipt(location, plan, shard)
        if receipt is None:
            raise StorageError(f"fragment {plan.id}: shard {shard} of {plan.shards} is not finished; encode it first")
        for key, record in receipt.objects.items():
            if location.size(f"{plan.path}/{key}") != record.bytes:
                raise DamagedObject(f"{location.uri}/{plan.path}/{key}: is missing or short; encode in a new root")
        receipts.append(receipt)
        records.append(vouch(location.read(receipt_key(plan, shard))))
    bad = sum(len(receipt.bad) for receipt in receipts)
    return CommittedFragment(
        fragment=plan.id, split=plan.split, rows=plan.rows - bad, bad=bad, retired=(),
        plan=vouch(location.read(f"{plan.path}/plan.json")), receipts=tuple(records),
    )  # fmt: skip


def committed_plan(location: Location, entry: CommittedFragment) -> Plan:
    """The plan that was committed. Raises MissingObject or DamagedObject if another one stands there now."""
    key = f"fragments/{entry.fragment}/plan.json"
    plan = unseal(read_vouched(location, key, entry.plan), f"{location.uri}/{key}", Plan)
    if plan.id != entry.fragment or plan.split != entry.split or plan.shards != len(entry.receipts):
        raise DamagedObject(f"{location.uri}/{key}: is not what was committed; restore it from a copy")
    return plan


def committed_receipt(location: Location, entry: CommittedFragment, plan: Plan, shard: int) -> Receipt:
    """The receipt that was committed. Raises MissingObject or DamagedObject."""
    read_vouched(location, receipt_key(plan, shard), entry.receipts[shard])
    receipt = read_receipt(location, plan, shard)
    if receipt is None:
        raise MissingObject(f"{location.uri}/{receipt_key(plan, shard)}: is missing; restore it from a copy")
    return receipt


def visible_ids(location: Location, entry: CommittedFragment, plan: Plan) -> dict[tuple[bytes, int], str]:
    """(id, augmentation) -> key of every row that readers see of this fragment."""
    retired = set(entry.retired)
    visible = {}
    for shard in range(plan.shards):
        bad = committed_receipt(location, entry, plan, shard).bad
        for row, key in enumerate(plan_rows(location, plan, shard).keys):
            if row not in bad and shard * plan.shard_rows + row not in retired:
                visible[row_id(key), AUGMENTATION] = key
    return visible


def _refuse_overlap(location: Location, entries: list[CommittedFragment], new: list[str]) -> None:
    """No (split, id, augmentation) is ever visible twice."""
    for split in {entry.split for entry in entries if entry.fragment in new}:
        seen: dict[tuple[bytes, int], str] = {}
        of_split = [entry for entry in entries if entry.split == split]
        if len(of_split) < 2:
            continue
        for entry in of_split:
            mine = visible_ids(location, entry, committed_plan(location, entry))
            twice = seen.keys() & mine.keys()
            if twice:
                raise StorageError(
                    f"fragment {entry.fragment}: {len(twice)} of its images, such as {mine[min(twice)]}, are visible "
                    f"already in split '{split}'; encode them into a new root, or commit only new images"
                )
            seen |= mine


def _training_moments(location: Location, entries: list[CommittedFragment]) -> TrainingMoments | None:
    """Merged from the shards' own, in the order of fragments and shards; put under the digest of its bytes."""
    parts: list[Moments] = []
    shape = None
    for entry in (entry for entry in entries if entry.split == "train"):
        plan = committed_plan(location, entry)
        if shape not in (None, plan.latent_shape):
            raise StorageError(f"fragment {plan.id}: latents {plan.latent_shape} beside others of shape {shape}")
        shape = plan.latent_shape
        for shard in range(plan.shards):
            parts.append(read_moments(location, plan, committed_receipt(location, entry, plan, shard)))
    if shape is None:
        return None
    merged = merge(parts, shape)
    data = merged.to_bytes()
    key = f"moments/{hashlib.sha256(data).hexdigest()[:24]}.f8"
    location.create(key, data)
    return TrainingMoments(key=key, count=merged.count, latent_shape=shape, object=vouch(data))


def status(location: Location) -> dict[str, float]:
    """Over all plans: shards done and left, rows bad and written, seconds of work. Cheap; trusts the receipts."""
    totals = {"done": 0.0, "left": 0.0, "bad": 0.0, "rows": 0.0, "seconds": 0.0}
    for key in location.list("fragments/"):
        parts = key.split("/")
        if parts[2:] != ["plan.json"]:
            continue
        plan = load_plan(location, parts[1])
        receipts = [read_receipt(location, plan, shard) for shard in range(plan.shards)]
        finished = [receipt for receipt in receipts if receipt is not None]
        totals["done"] += len(finished)
        totals["left"] += plan.shards - len(finished)
        totals["bad"] += sum(len(receipt.bad) for receipt in finished)
        totals["rows"] += sum(receipt.rows for receipt in finished)
        totals["seconds"] += sum(receipt.seconds for receipt in finished)
    return {key: value if key == "seconds" else int(value) for key, value in totals.items()}


def verify(location: Location, deep: bool = False) -> VerifyReport:
    """Check every object that the newest commit names: records wholly, data by length, or by sha256 if `deep`.

    Damage is reported, not raised; StorageError only where there is no functaset or commit at all.
    """
    return _Verification(location, deep).run()


class _Verification:
    def __init__(self, location: Location, deep: bool) -> None:
        self.location, self.deep = location, deep
        self.checked = 0
        self.bad: dict[str, str] = {}

    def run(self) -> VerifyReport:
        versions = _versions(self.location)
        if not versions:
            read_root(self.location)
            raise StorageError(f"{self.location.uri}: nothing is committed yet; finish encoding first")
        self._commits(versions)
        newest = self._guarded(_commit_key(versions[-1]), lambda: load_commit(self.location, versions[-1]))
        if newest is not None:
            self._guarded("zarr.json", lambda: read_root(self.location))
            for key, record in newest.objects.items():
                self._object(key, record)
            if newest.moments:
                self._object(newest.moments.key, newest.moments.object)
            for entry in newest.fragments:
                self._fragment(entry)
        bad = [{"path": path, "fault": fault} for path, fault in sorted(self.bad.items())]
        return VerifyReport(self.checked, bad)

    def _commits(self, versions: list[int]) -> None:
        """Each is sealed, and names the bytes of the one before it."""
        for version in versions:
            self.checked += 1
            found = self._guarded(_commit_key(version), partial(load_commit, self.location, version))
            before = _commit_key(version - 1)
            if found is None or found.parent is None:
                continue
            data = self.location.read(before) if self.location.exists(before) else b""
            if hashlib.sha256(data).hexdigest() != found.parent:
                self.bad.setdefault(before, "is missing, or not the one that the next commit was made on")

    def _fragment(self, entry: CommittedFragment) -> None:
        path = f"fragments/{entry.fragment}"
        self._object(f"{path}/plan.json", entry.plan)
        plan = self._guarded(f"{path}/plan.json", lambda: committed_plan(self.location, entry))
        if plan is None:
            return
        for key, record in plan.objects.items():
            self._object(f"{path}/{key}", record)
        for shard in range(plan.shards):
            key = receipt_key(plan, shard)
            self.checked += 1
            receipt = self._guarded(key, partial(committed_receipt, self.location, entry, plan, shard))
            for below, record in receipt.objects.items() if receipt else ():
                self._object(f"{path}/{below}", record)

    def _object(self, key: str, record: ObjectRecord) -> None:
        self.checked += 1
        size = self.location.size(key)
        if size is None:
            self.bad[key] = "is missing"
        elif size != record.bytes:
            self.bad[key] = f"has {size} bytes and should have {record.bytes}"
        elif self.deep and vouch(self.location.read(key)) != record:
            self.bad[key] = "was altered: sha256 does not match"

    def _guarded(self, key: str, check: Callable[[], Found]) -> Found | None:
        """What the check returns, or None with its complaint noted."""
        try:
            return check()
        except TransientError:
            raise  # a lost connection is no damage
        except StorageError as error:
            self.bad.setdefault(key, str(error).partition(": ")[2])
            return None
