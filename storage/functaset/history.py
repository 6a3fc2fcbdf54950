"""The versions of a functaset: commits, numbered and create-only, each with its parent and its own checksum.

    commits/00000001.json     Commit, sealed
    commits/00000001.sha256   of that file's bytes, written right after it: shows that the newest is missing or forged
    versions/00000001         empty, written after both: shows that there was such a commit, whatever commits/ lost
    lists/<digest>.json       EntryList, sealed: the first entries of commits that show many fragments

A commit names lists that the one before it wrote, so that it is about as long as what is new. Functasets of older
versions have no versions/ until the next commit. Readers trust commits alone. Of a shard whose rows are all retired
nothing is read or checked any more. The number of a version that expired stays taken: a committer that was held up must
find that another took its number.
"""

import hashlib
from collections.abc import Iterable
from functools import cached_property
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from functa.storage.errors import DamagedObject, MissingObject
from functa.storage.functaset.plan import row_id
from functa.storage.functaset.records import (
    FORMAT,
    NEWEST,
    ObjectRecord,
    Record,
    read_vouched,
    seal,
    unseal,
    vouch,
)
from functa.storage.places.address import MAX_JSON_BYTES
from functa.storage.places.location import Location
from functa.storage.places.side_by_side import side_by_side

MARK_BYTES = 100

RESTORE = "restore it from a copy"

EXPIRED = b"given up\n"  # what an expired version's file holds; these bytes are part of the format

LIST_ENTRIES = 32  # of a list; a commit itself has fewer

RANGES_OF_ENTRY = 16  # retired ranges that take as many bytes as an entry without

Ranges = tuple[tuple[int, int], ...]  # (start, stop), sorted and apart


class FragmentEntry(Record):
    """A fragment in a commit: its plan and receipts as they were when it was committed, and its retired rows.

    names: the first and the last of its rows' names, id and number of the augmentation.
    """

    fragment: str
    split: Literal["train", "test"]
    rows: int = Field(ge=0)  # visible ones: planned, less bad, less retired
    bad: int = Field(ge=0)  # less those retired
    retired: Ranges  # rows within the fragment
    plan: ObjectRecord
    receipts: tuple[ObjectRecord, ...] = ()  # of shard 0, 1, ...; in commits of format 1
    manifest: ObjectRecord | None = None  # that holds them, since format 2
    names: tuple[tuple[str, int], tuple[str, int]] | None = None

    @model_validator(mode="after")
    def _in_order(self) -> "FragmentEntry":
        if bool(self.receipts) == (self.manifest is not None):
            raise ValueError("names either a manifest or every receipt")
        edges = [edge for part in self.retired for edge in part]
        if edges != sorted(set(edges)) or min(edges, default=0) < 0:
            raise ValueError("retired rows are not ranges in order")
        return self


class ListRecord(Record):
    """A list of entries in a commit."""

    key: str = Field(pattern=r"^lists/[0-9a-f]{24}\.json$")
    object: ObjectRecord


class EntryList(Record):
    """Entries that many commits have in common."""

    format: Literal[1] = FORMAT
    fragments: tuple[FragmentEntry, ...]


class TrainingMoments(Record):
    """The object that holds the training split's latent moments."""

    key: str
    count: int = Field(ge=0)
    latent_shape: tuple[int, int, int]
    object: ObjectRecord


class Commit(Record):
    """A version: what is visible. `objects` are the functaset's own: the root document and the field.

    As it is stored, `fragments` lacks those of its lists, which come before them.
    """

    format: Literal[1, 2] = NEWEST
    version: int = Field(ge=1)
    oldest: int = Field(ge=1)  # earlier versions expired, so that their data can be collected
    parent: str | None  # sha256 of the parent commit's bytes
    fingerprint: str
    fragments: tuple[FragmentEntry, ...]
    lists: tuple[ListRecord, ...] = ()
    # Fragments that were visible and were retired as a whole, or replaced; none is shown again.
    retired_fragments: tuple[str, ...] = Field((), validation_alias="withdrawn", serialization_alias="withdrawn")
    # Ids of images that were retired by name, until their rows are erased.
    retired_images: tuple[str, ...] = Field((), validation_alias="barred", serialization_alias="barred")
    moments: TrainingMoments | None
    objects: dict[str, ObjectRecord]

    def retires(self, key: str) -> bool:
        """Return whether the image was retired by name: no encoding of its source shows it again, in any split."""
        return row_id(key).hex() in self._images

    @cached_property
    def _images(self) -> frozenset[str]:
        return frozenset(self.retired_images)


Lists = dict[str, tuple[FragmentEntry, ...]]  # by key


def stored(commit: Commit) -> tuple[Commit, dict[str, bytes]]:
    """Return a commit with all its entries as (what is written, objects of its lists by key)."""
    entries, lists, weight, start = commit.fragments, dict[str, bytes](), 0, 0
    for stop, entry in enumerate(entries, 1):
        weight += 1 + len(entry.retired) // RANGES_OF_ENTRY
        if weight >= LIST_ENTRIES:
            data = seal(EntryList(fragments=entries[start:stop]))
            lists[f"lists/{hashlib.sha256(data).hexdigest()[:24]}.json"] = data
            start, weight = stop, 0
    named = tuple(ListRecord(key=key, object=vouch(data)) for key, data in lists.items())
    return commit.model_copy(update={"fragments": entries[start:], "lists": named}), lists


def latest(location: Location) -> Commit | None:
    """Return the newest commit, None where nothing was ever committed. Raises DamagedObject: altered or missing."""
    found = versions(location)
    try:
        return load_commit(location, found[-1]) if found else None
    except DamagedObject as error:
        if len(found) == 1:
            raise
        raise DamagedObject(f"{error}; older versions are read by Functaset.open(uri, version=N)") from None


def load_commit(location: Location, version: int, known: Lists | None = None) -> Commit:
    """Return the commit of a version. Raises MissingObject (naming the versions that exist) or DamagedObject.

    known: lists that other commits named, which are not read again.
    """
    name = f"{location.uri}/{commit_key(version)}"
    mark = _mark_of(location, version)
    try:
        data = location.read(commit_key(version), limit=MAX_JSON_BYTES)
    except MissingObject:
        if _was_committed(location, version):
            raise DamagedObject(f"{name}: is missing; {RESTORE}") from None
        raise MissingObject(f"{location.uri}: has no version {version}; {_known(location)}") from None
    if data == EXPIRED:
        raise MissingObject(f"{location.uri}: version {version} has expired; {_known(location)}")
    commit = unseal(data, name, Commit)
    if commit.version != version:
        raise DamagedObject(f"{name}: is version {commit.version}; it was renamed")
    if mark not in (None, hashlib.sha256(data).hexdigest()):
        raise DamagedObject(f"{name}: is not the one that was committed; restore it and its .sha256 from a copy")
    return _with_lists(location, commit, {} if known is None else known)


def _with_lists(location: Location, commit: Commit, known: Lists) -> Commit:
    """Return a commit with the entries of its lists. Raises DamagedObject."""
    if not commit.lists:
        return commit

    def read(named: ListRecord) -> tuple[FragmentEntry, ...]:
        try:
            data = read_vouched(location, named.key, named.object)
        except MissingObject as error:
            raise DamagedObject(str(error)) from None
        return unseal(data, f"{location.uri}/{named.key}", EntryList).fragments

    new = [named for named in commit.lists if named.key not in known]
    known |= zip((named.key for named in new), side_by_side(location, read, new), strict=True)
    before = tuple(entry for named in commit.lists for entry in known[named.key])
    return commit.model_copy(update={"fragments": (*before, *commit.fragments)})


def _was_committed(location: Location, version: int) -> bool:
    """Return whether a version whose file is missing was committed and has not expired: versions have no gaps."""
    found = versions(location)
    if not found or version > found[-1]:
        return False
    return version == found[-1] or version >= load_commit(location, found[-1]).oldest


def _known(location: Location) -> str:
    found = versions(location)
    newest = load_commit(location, found[-1]) if found else None
    kept = [str(version) for version in found if newest is not None and version >= newest.oldest]
    return f"versions: {', '.join(kept) or 'none'}"


def _mark_of(location: Location, version: int) -> str | None:
    """Return the mark, None where there is none: the commit's writer may have been killed before it."""
    try:
        return location.read(mark_key(version), limit=MARK_BYTES).decode(errors="replace").strip()
    except MissingObject:
        return None


def commit_key(version: int) -> str:
    """Return the key of a commit."""
    return f"commits/{version:08d}.json"


def mark_key(version: int) -> str:
    """Return the key of the mark: the sha256 of the commit's bytes."""
    return f"commits/{version:08d}.sha256"


def number_key(version: int) -> str:
    """Return the key of the empty object that shows, apart from commits/, that there was a commit."""
    return f"versions/{version:08d}"


def versions(location: Location) -> list[int]:
    """Return all versions of which a commit, a mark or a number is there, expired ones too, sorted."""
    names = (key.removeprefix("commits/").rpartition(".") for key in location.list("commits/"))
    found = {int(stem) for stem, _, end in names if stem.isdecimal() and end in ("json", "sha256")}
    return sorted(found | _numbers(location))


def _numbers(location: Location) -> set[int]:
    stems = (key.removeprefix("versions/") for key in location.list("versions/"))
    return {int(stem) for stem in stems if stem.isdecimal()}


def kept_commits(location: Location, newest: Commit) -> list[Commit]:
    """Return every version that has not expired, but the newest. Raises DamagedObject where one is missing."""
    kept = {*range(newest.oldest, newest.version), *(each for each in versions(location) if each >= newest.oldest)}
    commits: list[Commit] = []
    known: Lists = {}
    for version in sorted(kept - {newest.version}):
        try:
            commits.append(load_commit(location, version, known))
        except DamagedObject as error:
            expire = f"functa store gc --delete --keep-versions {newest.version - version}"
            raise DamagedObject(f"{error}, or expire it and those before it: {expire}") from None
    return commits


def as_ranges(rows: Iterable[int]) -> Ranges:
    """Return rows as ranges (start, stop), sorted and apart."""
    numbers = np.unique(np.fromiter(rows, np.int64))
    if len(numbers) == 0:
        return ()
    breaks = np.flatnonzero(np.diff(numbers) != 1)
    starts, ends = numbers[np.r_[0, breaks + 1]], numbers[np.r_[breaks, len(numbers) - 1]]
    return tuple((int(start), int(end) + 1) for start, end in zip(starts, ends, strict=True))


def as_rows(ranges: Ranges) -> list[int]:
    """Return the rows of ranges, the inverse of as_ranges."""
    return [row for start, stop in ranges for row in range(start, stop)]
