"""Verification of a functaset against its records."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from functa.storage.errors import StorageError
from functa.storage.functaset.fragment import Fragment
from functa.storage.functaset.header import FRAGMENTS, check_fragments_group, read_root
from functa.storage.functaset.history import Commit, FragmentEntry, Lists, commit_key, load_commit, mark_key
from functa.storage.functaset.history import versions as all_versions
from functa.storage.functaset.plan import TABLES, fragment_path, rows_name
from functa.storage.functaset.receipts.manifest import blocks_key, manifest_key
from functa.storage.functaset.records import ObjectRecord, vouch
from functa.storage.functaset.shards.shard import Shard
from functa.storage.places.local import may_pass
from functa.storage.places.location import Location
from functa.storage.places.side_by_side import side_by_side

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
            self._objects(newest.objects | ({newest.moments.key: newest.moments.object} if newest.moments else {}))
            for entry in newest.fragments:
                self._fragment(entry)
        bad = [{"path": path, "fault": fault} for path, fault in sorted(self.bad.items())]
        return VerifyReport(self.checked, bad)

    def _commits(self, versions: list[int], newest: Commit | None) -> None:
        """Check each one's seal and that it names the bytes of the one before it; expired ones may be missing."""
        known: Lists = {}
        for version in versions:
            self.checked += 1
            found = self._guarded(commit_key(version), partial(load_commit, self.location, version, known))
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
        sizes = self._sizes(f"{path}/")
        self._objects({f"{path}/plan.json": entry.plan}, sizes)
        fragment = self._guarded(f"{path}/plan.json", lambda: Fragment.committed(self.location, entry))
        if fragment is None:
            return
        live = fragment.live
        unused = {rows_name(shard.number) for shard in fragment.shards} - {rows_name(shard.number) for shard in live}
        objects = {f"{path}/{key}": found for key, found in fragment.plan.objects.items() if key not in unused}
        for shard in live if TABLES in fragment.plan.objects else ():
            objects[f"{path}/{rows_name(shard.number)}"] = fragment.table_record(shard.number)
        self._objects(objects, sizes)
        if not self._manifest(fragment, sizes):
            return
        self.checked += len(live)
        for found in side_by_side(self.location, self._receipt, live):
            self._objects({f"{path}/{key}": record for key, record in found.items()}, sizes)

    def _sizes(self, prefix: str) -> dict[str, int]:
        """List the sizes of objects; of those that are not listed, each is asked for."""
        try:
            return {found.key: found.size for found in self.location.entries(prefix)}
        except StorageError as error:
            if may_pass(self.location, error):
                raise
            return {}

    def _manifest(self, fragment: Fragment, sizes: dict[str, int]) -> bool:
        """Check a fragment's manifest, if its commit names one; return whether the receipts can be checked."""
        if fragment.entry is None or fragment.entry.manifest is None:
            return True
        key = manifest_key(fragment.id)
        self._objects({key: fragment.entry.manifest}, sizes)
        manifest = self._guarded(key, lambda: fragment.manifest)
        if manifest is not None and manifest.described.blocks is not None:
            self._objects({blocks_key(fragment.id): manifest.described.blocks}, sizes)
        return manifest is not None

    def _receipt(self, shard: Shard) -> dict[str, ObjectRecord]:
        """Check a shard's receipt; return the shard's objects, as far as they are known."""
        self._guarded(shard.receipt_key, partial(getattr, shard, "stored_receipt"))
        known = self._guarded(shard.receipt_key, partial(getattr, shard, "receipt"))
        return known.objects if known else {}

    def _objects(self, records: dict[str, ObjectRecord], sizes: dict[str, int] | None = None) -> None:
        """Check objects. sizes: as they were listed."""
        self.checked += len(records)

        def check(named: tuple[str, ObjectRecord]) -> None:
            key, record = named
            self._guarded(key, lambda: self._compare(key, record, (sizes or {}).get(key)))

        for _ in side_by_side(self.location, check, records.items()):
            pass

    def _compare(self, key: str, record: ObjectRecord, listed: int | None) -> None:
        size = self.location.size(key) if listed is None else listed
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
