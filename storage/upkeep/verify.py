"""Verification of a functaset against its records."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from functa.storage.errors import StorageError
from functa.storage.functaset.fragment import Fragment
from functa.storage.functaset.header import FRAGMENTS, check_fragments_group, read_root
from functa.storage.functaset.history import Commit, FragmentEntry, commit_key, load_commit, mark_key
from functa.storage.functaset.history import versions as all_versions
from functa.storage.functaset.plan import fragment_path, rows_name
from functa.storage.functaset.records import ObjectRecord, vouch
from functa.storage.places.local import may_pass
from functa.storage.places.location import Location

Found = TypeVar("Found")


@dataclass(frozen=True)
class VerifyReport:
    """The number of objects checked, and the bad ones as {"path", "fault"}."""

    checked: int
    bad: list[dict[str, str]]


def verify(location: Location, deep: bool = False) -> VerifyReport:
    """Check every object that the newest commit names: records wholly, data by length, or by sha256 if `deep`.

    Damage is reported, not raised, and so is what a local disk cannot read any more. Raises StorageError where there
    is no functaset or commit at all, TransientError where the location itself does not answer.
    """
    while True:
        before = all_versions(location)
        report = _Verification(location, deep).run()
        if not report.bad or all_versions(location)[-1] == before[-1]:
            return report  # else gc may have collected what only the version that was checked had


class _Verification:
    def __init__(self, location: Location, deep: bool) -> None:
        self.location, self.deep = location, deep
        self.checked = 0
        self.bad: dict[str, str] = {}

    def run(self) -> VerifyReport:
        versions = all_versions(self.location)
        if not versions:
            read_root(self.location)
            raise StorageError(f"{self.location.uri}: nothing is committed yet; finish encoding first")
        newest = self._guarded(commit_key(versions[-1]), lambda: load_commit(self.location, versions[-1]))
        self._commits(versions if newest is None else [*range(newest.oldest, newest.version + 1)], newest)
        if newest is not None:
            self._guarded("zarr.json", lambda: read_root(self.location))
            self.checked += 1
            self._guarded(FRAGMENTS, lambda: check_fragments_group(self.location))
            for key, record in newest.objects.items():
                self._object(key, record)
            if newest.moments:
                self._object(newest.moments.key, newest.moments.object)
            for entry in newest.fragments:
                self._fragment(entry)
        bad = [{"path": path, "fault": fault} for path, fault in sorted(self.bad.items())]
        return VerifyReport(self.checked, bad)

    def _commits(self, versions: list[int], newest: Commit | None) -> None:
        """Check each one's seal and that it names the bytes of the one before it; expired ones may be missing."""
        for version in versions:
            self.checked += 1
            found = self._guarded(commit_key(version), partial(load_commit, self.location, version))
            # The newest one's writer may have been killed before it; who commits on top makes sure of the older one's.
            mark = mark_key(version)
            if version < versions[-1] and self._guarded(mark, partial(self.location.exists, mark)) is False:
                self.bad[mark] = "is missing"
            if found is None or found.parent is None or (newest is not None and version == newest.oldest):
                continue
            before = commit_key(version - 1)
            data = self._guarded(before, partial(self.location.read, before))
            if data is not None and hashlib.sha256(data).hexdigest() != found.parent:
                self.bad.setdefault(before, "is missing, or not the one that the next commit was made on")

    def _fragment(self, entry: FragmentEntry) -> None:
        path = fragment_path(entry.fragment)
        self._object(f"{path}/plan.json", entry.plan)
        fragment = self._guarded(f"{path}/plan.json", lambda: Fragment.committed(self.location, entry))
        if fragment is None:
            return
        live = fragment.live
        unused = {rows_name(shard.number) for shard in fragment.shards} - {rows_name(shard.number) for shard in live}
        for key, record in fragment.plan.objects.items():
            if key not in unused:
                self._object(f"{path}/{key}", record)
        for shard in live:
            self.checked += 1
            receipt = self._guarded(shard.receipt_key, partial(getattr, shard, "receipt"))
            for below, record in receipt.objects.items() if receipt else ():
                self._object(f"{path}/{below}", record)

    def _object(self, key: str, record: ObjectRecord) -> None:
        self.checked += 1
        self._guarded(key, partial(self._compare, key, record))

    def _compare(self, key: str, record: ObjectRecord) -> None:
        size = self.location.size(key)
        if size is None:
            self.bad[key] = "is missing"
        elif size != record.bytes:
            self.bad[key] = f"has {size} bytes and should have {record.bytes}"
        elif self.deep and vouch(self.location.read(key)) != record:
            self.bad[key] = "was altered: sha256 does not match"

    def _guarded(self, key: str, check: Callable[[], Found]) -> Found | None:
        """Return what the check returns, or None with its error noted."""
        try:
            return check()
        except StorageError as error:
            if may_pass(self.location, error):
                raise  # a broken connection is no damage
            self.bad.setdefault(key, str(error).partition(": ")[2])
            return None
