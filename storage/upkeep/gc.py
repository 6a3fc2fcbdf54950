"""Garbage collection: deletes the functaset's own objects that no version names.

Its own objects are those whose keys this package writes; anything else in the folder is listed and left alone. An
object is due when no kept commit names it and it has not changed for a while: its fragment may still be encoded.

Four words: rows are *retired* by a commit; versions *expire* (--keep-versions); objects that no version names are
*collected*; retired rows are *erased* when their fragments are rewritten without them (--erase-retired).
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from functa.storage.errors import DamagedObject, MissingObject, StorageError
from functa.storage.functaset.commit import COMMIT, commit
from functa.storage.functaset.fragment import Fragment
from functa.storage.functaset.header import Root, read_root
from functa.storage.functaset.history import (
    EXPIRED,
    Commit,
    commit_key,
    kept_commits,
    latest,
    versions,
)
from functa.storage.functaset.plan import COLLECT, claim_key
from functa.storage.functaset.records import read_record
from functa.storage.places.location import Entry, Location
from functa.storage.upkeep.erase import rewrite

DAY = 86400.0

FRAGMENT = re.compile(
    r"fragments/([0-9a-f]{24})/(claim|zarr\.json|plan\.json|rows/(?:\d{6,}\.json|records\.bin)"
    r"|receipts/\d{6,}\.\d+\.json|moments/(?:\d{6,}|blocks)\.f8|manifest\.safetensors"
    r"|(?:z|label|id|augmentation|psnr|source_sha256|quantization(?:/low|/step)?)/(?:zarr\.json|c/\d+(?:/0)*))"
)

SHARED = re.compile(r"moments/[0-9a-f]{24}\.f8|lists/[0-9a-f]{24}\.json")  # named by commits, often by several

FIELD = re.compile(r"fields/([A-Za-z0-9_-]{1,128})\.(safetensors|json)")

COMMITS = re.compile(r"commits/(\d{8})\.(json|sha256)")

NUMBERS = re.compile(r"versions/\d{8}")  # never collected: the number of an expired version stays taken

LEFTOVER = re.compile(r"(.*/)?\.[^/]+\.[0-9a-f]{32}\.partial")


@dataclass
class Collected:
    """The result of a collection, or of a dry run."""

    deleted: bool  # False: a dry run, nothing was changed
    removed: list[str] = field(default_factory=list)  # keys of objects that were collected
    bytes: int = 0  # of these objects
    fragments: list[str] = field(default_factory=list)  # that were collected whole
    versions: list[int] = field(default_factory=list)  # that expired
    rewritten: list[str] = field(default_factory=list)  # fragments whose retired rows were erased
    unknown: list[str] = field(default_factory=list)  # keys that this package does not write
    young: list[str] = field(default_factory=list)  # fragments and leftovers that may still be written


def collect(
    location: Location,
    *,
    delete: bool = False,
    older_than: float = DAY,
    keep_versions: int | None = None,
    erase_retired: bool = False,
    now: Callable[[], float] = time.time,
) -> Collected:
    """Collect what no kept version names, or with delete=False return what that would be.

    older_than: seconds since the last change of what was never committed. keep_versions: expire all versions but the
    newest so many. erase_retired: rewrite fragments that hold retired rows without them and expire all earlier
    versions, so that no byte of those rows is left in what was committed; what is young and uncommitted is listed,
    hydrated copies lie elsewhere, and an image that its source still has is encoded again by the next encoding.
    Interrupted, it continues when it is run again.
    Raises StorageError: no functaset; DamagedObject: a kept commit that is damaged or missing, or that may be missing,
    as nothing could be proved unreferenced then. Nothing is changed in these cases.
    """
    root = read_root(location)
    result = Collected(delete)
    newest = latest(location)
    _refuse_lost_commits(location, newest)
    if newest is not None and (erase_retired or keep_versions):
        would = _expire(location, newest, keep_versions, erase_retired, Collected(deleted=False))
        kept_commits(location, would)  # raises before a commit expires the others
        newest = _expire(location, newest, keep_versions, erase_retired, result)
    _Collection(location, root, newest, now() - older_than, result).run()
    return result


def _refuse_lost_commits(location: Location, newest: Commit | None) -> None:
    """Raise DamagedObject if a fragment was claimed for a commit that is not there and may have been lost.

    Where there are numbers, there is one of every version that another was committed on: then nothing was.
    """
    if location.list("versions/"):
        return
    named = {entry.fragment for entry in newest.fragments} | {*newest.retired_fragments} if newest else set[str]()
    claimed = {key.split("/")[1] for key in location.list("fragments/") if key.endswith("/claim")}
    lost = [fragment for fragment in claimed - named if _claim_on(location, fragment) == COMMIT]
    if lost:
        what = "no commit" if newest is None else f"no commit after {newest.version}"
        raise DamagedObject(
            f"{location.uri}/commits: holds {what}, though {len(lost)} fragments that none names were claimed for one, "
            f"so nothing is collected; restore commits/ from a copy, or encode again"
        )


def _expire(
    location: Location, newest: Commit, keep_versions: int | None, erase_retired: bool, result: Collected
) -> Commit:
    """Commit so that older versions expire; without delete, return what that commit would be."""
    entries = [entry for entry in newest.fragments if entry.retired] if erase_retired else []
    result.rewritten += [entry.fragment for entry in entries]
    if erase_retired:
        kept = {entry.fragment for entry in newest.fragments}
        held = {entry.fragment for each in kept_commits(location, newest) for entry in each.fragments} - kept
        keep_versions = 1 if entries or held or newest.retired_images else keep_versions
    if keep_versions is None:
        return newest
    if result.deleted:
        fresh = [rewrite([Fragment.committed(location, entry)]).id for entry in entries]
        made = commit(
            location, fresh, retire_fragments=result.rewritten, erased=erase_retired, keep_versions=keep_versions
        )
        if erase_retired and any(entry.retired for entry in made.fragments):  # retired meanwhile
            return _expire(location, made, keep_versions, erase_retired, result)
        return made
    if not entries and newest.version - keep_versions < newest.oldest:
        return newest
    fragments = tuple(entry for entry in newest.fragments if entry not in entries)
    oldest = max(newest.oldest, newest.version + 2 - keep_versions)  # of the commit that would be made
    return newest.model_copy(update={"oldest": oldest, "fragments": fragments})


def _claim_on(location: Location, fragment: str) -> bytes | None:
    try:
        return location.read(claim_key(fragment))
    except MissingObject:
        return None


class _Collection:
    def __init__(self, location: Location, root: Root, newest: Commit | None, horizon: float, result: Collected):
        self.location, self.horizon, self.result = location, horizon, result
        found = versions(location)
        oldest = newest.oldest if newest else 1
        self.seen = found[-1] if found else 0
        self.expired = [version for version in found if version < oldest]
        self.fragments: set[str] = set()
        self.shared: set[str] = set()
        for each in [*kept_commits(location, newest), newest] if newest is not None else []:
            self._keep(each)  # the newest of a dry run is a commit that does not exist
        retired = {*(newest.retired_fragments if newest else ()), *result.rewritten}
        self.forgotten = retired - self.fragments
        self.field = root.field

    def _keep(self, each: Commit) -> None:
        self.fragments |= {entry.fragment for entry in each.fragments}
        self.shared |= _shared_by(each)

    def _shared_by(self, entry: Entry) -> set[str]:
        """Return the shared objects of an expired commit; none where its file is emptied already, or damaged."""
        if entry.size == len(EXPIRED) or not entry.key.endswith(".json"):
            return set()
        try:
            return _shared_by(read_record(self.location, entry.key, Commit))
        except StorageError:
            return set()

    def run(self) -> None:
        parts: dict[str, list[Entry]] = {}
        commits: list[Entry] = []
        shared: list[Entry] = []
        unneeded: list[Entry] = []
        for entry in self.location.entries():
            if match := FRAGMENT.fullmatch(entry.key):
                parts.setdefault(match[1], []).append(entry)
            elif match := COMMITS.fullmatch(entry.key):
                commits += [entry] if int(match[1]) in self.expired else []
            elif SHARED.fullmatch(entry.key):
                shared += [entry] if entry.key not in self.shared else []
            elif match := FIELD.fullmatch(entry.key):
                unneeded += [entry] if match[1] != self.field else []
            elif entry.key not in ("zarr.json", "fragments/zarr.json") and not NUMBERS.fullmatch(entry.key):
                self.result.unknown.append(entry.key)
        for entry in self.location.leftovers():
            if LEFTOVER.fullmatch(entry.key):
                self.result.young += [entry.key] if entry.modified >= self.horizon else []
                unneeded.append(entry)
        for entry in unneeded:
            if entry.modified < self.horizon:
                self._remove(entry)
        self._fragments(parts)
        of_expired = {key for entry in commits for key in self._shared_by(entry)}
        for entry in shared:
            if entry.key in of_expired or entry.modified < self.horizon:
                self._shared(entry)
        # Last: while they exist, a collection that was interrupted still knows what they named.
        # A commit follows its mark, which alone would mean that the commit is missing.
        for entry in sorted(commits, key=lambda entry: (entry.key[:16], entry.key.endswith(".json"))):
            self._expire(entry)

    def _expire(self, entry: Entry) -> None:
        if entry.key.endswith(".sha256"):
            self._remove(entry)
        elif entry.size != len(EXPIRED):
            self.result.versions.append(int(entry.key[8:16]))
            self.result.removed.append(entry.key)
            self.result.bytes += entry.size
            if self.result.deleted:
                self.location.write(entry.key, EXPIRED)

    def _shared(self, entry: Entry) -> None:
        """Delete it; a commit that made the same one meanwhile checks again, or is seen here."""
        try:
            data = self.location.read(entry.key) if self.result.deleted else b""
        except MissingObject:
            return
        self._remove(entry)
        if not self.result.deleted:
            return
        since = [version for version in versions(self.location) if version > self.seen]
        named = (read_record(self.location, commit_key(version), Commit) for version in since)
        if any(entry.key in _shared_by(made) for made in named):
            self.location.create(entry.key, data)

    def _fragments(self, parts: dict[str, list[Entry]]) -> None:
        due = {fragment: objects for fragment, objects in parts.items() if self._is_due(fragment, objects)}
        for fragment in self._claimed(list(due)) if self.result.deleted else list(due):
            # The plan first, so that nobody reads what is being deleted. The claim stays for writers that were held up.
            for entry in sorted(due[fragment], key=lambda entry: not entry.key.endswith("plan.json")):
                if entry.key != claim_key(fragment):
                    self._remove(entry)
            self.result.fragments.append(fragment)

    def _is_due(self, fragment: str, objects: list[Entry]) -> bool:
        claimed = any(entry.key == claim_key(fragment) for entry in objects)
        begun = claimed and _claim_on(self.location, fragment) == COLLECT
        if fragment in self.fragments:
            if begun and self.result.deleted:  # of a collection that was killed before it saw the commit
                self.location.write(claim_key(fragment), COMMIT)
            return False
        if begun:
            return len(objects) > 1
        if max(entry.modified for entry in objects) >= self.horizon and fragment not in self.forgotten:
            self.result.young.append(f"fragments/{fragment}")
            return False
        return True

    def _claimed(self, fragments: list[str]) -> list[str]:
        """Claim fragments; return those to delete: nobody commits them from now on, and nobody has."""
        held, taken_over = [], False
        for fragment in fragments:
            if self.location.create(claim_key(fragment), COLLECT):
                held.append(fragment)
            elif self._takes_over(fragment):
                held.append(fragment)
                taken_over |= fragment not in self.forgotten  # those were retired: no commit shows them again
            else:
                self.result.young.append(f"fragments/{fragment}")
        if taken_over:
            commit(self.location, [], again=True)
        newest = latest(self.location)
        shown = {entry.fragment for entry in newest.fragments} if newest else set()
        for fragment in shown.intersection(held):
            self.location.write(claim_key(fragment), COMMIT)
        return [fragment for fragment in held if fragment not in shown]

    def _takes_over(self, fragment: str) -> bool:
        """Take a claim over from another collection, or from a committer that died long ago; return whether it did."""
        existing = self.location.entry(claim_key(fragment))
        claim = _claim_on(self.location, fragment)
        if existing is None or claim is None:
            return False  # deleted by hand
        if claim != COLLECT:
            if fragment not in self.forgotten and existing.modified >= self.horizon:
                return False
            self.location.write(claim_key(fragment), COLLECT)
        return True

    def _remove(self, entry: Entry) -> None:
        self.result.removed.append(entry.key)
        self.result.bytes += entry.size
        if self.result.deleted:
            self.location.delete(entry.key)


def _shared_by(made: Commit) -> set[str]:
    """Return the keys of the objects that a commit may have in common with others."""
    return {named.key for named in made.lists} | ({made.moments.key} if made.moments else set())
