"""Garbage collection: removes only what is provably ours and named by no version that is kept.

Ours is what lies where this package puts things; anything else in the folder is told and left alone. Unreferenced
is what no kept commit names and nobody has touched for a while, for a fragment may be in the making.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from storage.commits import Commit, commit_key, committed_plan, latest, load_commit, versions
from storage.committing import COMMIT, commit
from storage.locations import Entry, Location
from storage.plans import COLLECT, claim_key
from storage.rewriting import rewrite
from storage.root import Root, read_root

DAY = 86400.0
FRAGMENT = re.compile(
    r"fragments/([0-9a-f]{24})/(claim|zarr\.json|plan\.json|rows/\d{6}\.json|receipts/\d{6}\.\d+\.json|moments/\d{6}\.f8"
    r"|(?:z|label|id|augmentation|psnr|source_sha256|quantization(?:/low|/step)?)/(?:zarr\.json|c/\d+(?:/0)*))"
)
MOMENTS = re.compile(r"moments/[0-9a-f]{24}\.f8")
FIELD = re.compile(r"fields/([A-Za-z0-9_-]{1,128})\.(safetensors|json)")
COMMITS = re.compile(r"commits/(\d{8})\.(json|sha256)")
LEFTOVER = re.compile(r"(.*/)?\.[^/]+\.[0-9a-f]{32}\.partial")


@dataclass
class Collected:
    """What was removed, or would be; `unknown` lies there and is not ours, or not provably."""

    deleted: bool
    removed: list[str] = field(default_factory=list)
    bytes: int = 0
    fragments: list[str] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    rewritten: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    young: list[str] = field(default_factory=list)  # fragments and leftovers that may be in the making


def collect(
    location: Location,
    *,
    delete: bool = False,
    older_than: float = DAY,
    keep_versions: int | None = None,
    erase_retired: bool = False,
    now: Callable[[], float] = time.time,
) -> Collected:
    """Remove what no kept version names, or with delete=False say what that would be.

    older_than: seconds since the last change of what was never committed. keep_versions: give up all versions but the
    newest so many. erase_retired: write fragments that hold retired rows anew without them and give up all earlier
    versions, so that no byte of those rows is left in what was committed; what is young and uncommitted is named, and
    hydrated copies lie elsewhere. Interrupted, it goes on when it is run again.
    Raises StorageError: no functaset, a damaged commit (nothing could be proved unreferenced then).
    """
    root = read_root(location)
    result = Collected(delete)
    newest = latest(location)
    if newest is not None and (erase_retired or keep_versions):
        newest = _give_up(location, newest, keep_versions, erase_retired, result)
    _Collection(location, root, newest, now() - older_than, result).run()
    return result


def _give_up(
    location: Location, newest: Commit, keep_versions: int | None, erase_retired: bool, result: Collected
) -> Commit:
    """The commit after which older ones are not needed; without delete, what it would be."""
    entries = [entry for entry in newest.fragments if entry.retired] if erase_retired else []
    result.rewritten += [entry.fragment for entry in entries]
    if erase_retired:
        kept = {entry.fragment for entry in newest.fragments}
        shown = (load_commit(location, version) for version in versions(location) if version >= newest.oldest)
        held = {entry.fragment for each in shown for entry in each.fragments} - kept
        keep_versions = 1 if entries or held else keep_versions
    if keep_versions is None:
        return newest
    if result.deleted:
        fresh = [rewrite(location, entry, committed_plan(location, entry)).id for entry in entries]
        made = commit(location, fresh, drop=result.rewritten, keep_versions=keep_versions)
        if erase_retired and any(entry.retired for entry in made.fragments):  # retired while we wrote
            return _give_up(location, made, keep_versions, erase_retired, result)
        return made
    if not entries and newest.version - keep_versions < newest.oldest:
        return newest
    fragments = tuple(entry for entry in newest.fragments if entry not in entries)
    oldest = max(newest.oldest, newest.version + 2 - keep_versions)  # of the commit that would be made
    return newest.model_copy(update={"oldest": oldest, "fragments": fragments})


class _Collection:
    def __init__(self, location: Location, root: Root, newest: Commit | None, horizon: float, result: Collected):
        self.location, self.horizon, self.result = location, horizon, result
        found = versions(location)
        oldest = newest.oldest if newest else 1
        kept = [load_commit(location, version) for version in found if oldest <= version]
        if newest is not None and newest not in kept:  # a dry run's
            kept = [each for each in kept if each.version != newest.version] + [newest]
        self.given_up = [version for version in found if version < oldest]
        # Of one that was being removed only the mark, or nothing, may be left.
        forgotten = [load_commit(location, v) for v in self.given_up if location.exists(commit_key(v))]
        self.fragments = {entry.fragment for each in kept for entry in each.fragments}
        self.forgotten = {entry.fragment for each in forgotten for entry in each.fragments} - self.fragments
        self.forgotten |= set(result.rewritten) - self.fragments
        self.moments = {each.moments.key for each in kept if each.moments}
        self.old_moments = {each.moments.key for each in forgotten if each.moments} - self.moments
        self.field = root.field

    def run(self) -> None:
        parts: dict[str, list[Entry]] = {}
        commits: list[Entry] = []
        moments: list[Entry] = []
        for entry in self.location.entries():
            if match := FRAGMENT.fullmatch(entry.key):
                parts.setdefault(match[1], []).append(entry)
            elif match := COMMITS.fullmatch(entry.key):
                commits += [entry] if int(match[1]) in self.given_up else []
            elif MOMENTS.fullmatch(entry.key):
                moments += [entry] if entry.key not in self.moments else []
            elif match := FIELD.fullmatch(entry.key):
                self._unless(match[1] == self.field, entry)
            elif entry.key not in ("zarr.json", "fragments/zarr.json"):
                self.result.unknown.append(entry.key)
        for entry in self.location.leftovers():
            if LEFTOVER.fullmatch(entry.key):
                self.result.young += [entry.key] if entry.modified >= self.horizon else []
                self._unless(False, entry)
        self._fragments(parts)
        for entry in moments:
            if entry.key in self.old_moments or entry.modified < self.horizon:
                self._moments(entry)
        # Last: while they stand, a collection that was interrupted still knows what they named.
        # A commit goes after its mark, which alone would speak of a commit that was lost.
        for entry in sorted(commits, key=lambda entry: (entry.key[:16], entry.key.endswith(".json"))):
            self._remove(entry)
        self.result.versions = self.given_up

    def _unless(self, needed: bool, entry: Entry) -> None:
        if not needed and entry.modified < self.horizon:
            self._remove(entry)

    def _moments(self, entry: Entry) -> None:
        """A commit may come to the same moments and find them standing: it looks again after us, or we see it."""
        data = self.location.read(entry.key)
        self._remove(entry)
        newest = latest(self.location) if self.result.deleted else None
        if newest is not None and newest.moments is not None and newest.moments.key == entry.key:
            self.location.create(entry.key, data)

    def _fragments(self, parts: dict[str, list[Entry]]) -> None:
        due = {fragment: objects for fragment, objects in parts.items() if self._is_due(fragment, objects)}
        claimed = self._claimed(list(due)) if self.result.deleted else list(due)
        for fragment in claimed:
            claim = claim_key(fragment)
            # The plan first, so that nobody trusts what is going; the claim last, so that nobody begins it anew
            # meanwhile.
            for entry in sorted(due[fragment], key=lambda entry: not entry.key.endswith("plan.json")):
                if entry.key != claim:
                    self._remove(entry)
            self.result.fragments.append(fragment)
            if self.result.deleted:
                self.location.delete(claim)

    def _is_due(self, fragment: str, objects: list[Entry]) -> bool:
        claim = claim_key(fragment)
        begun = any(entry.key == claim for entry in objects) and self.location.read(claim) == COLLECT
        if fragment in self.fragments:
            if begun and self.result.deleted:  # of a collection that was killed before it saw the commit
                self.location.write(claim, COMMIT)
            return False
        if max(entry.modified for entry in objects) >= self.horizon and not (fragment in self.forgotten or begun):
            self.result.young.append(f"fragments/{fragment}")
            return False
        return True

    def _claimed(self, fragments: list[str]) -> list[str]:
        """Those that are ours to remove: nobody commits them from now on, and nobody has."""
        held, broken = [], False
        for fragment in fragments:
            key = claim_key(fragment)
            standing = self.location.entry(key)
            if standing is None or self.location.read(key) == COLLECT:
                ours = self.location.create(key, COLLECT) or self.location.read(key) == COLLECT
            else:  # of a committer that died long ago, if it did, or of a version that was given up
                ours = fragment in self.forgotten or standing.modified < self.horizon
                if ours:
                    self.location.write(key, COLLECT)
                    broken |= fragment not in self.forgotten  # those are withdrawn, and never committed again
            if ours:
                held.append(fragment)
            else:
                self.result.young.append(f"fragments/{fragment}")
        if broken:
            commit(self.location, [], again=True)
        newest = latest(self.location)
        shown = {entry.fragment for entry in newest.fragments} if newest else set()
        for fragment in shown.intersection(held):
            self.location.write(claim_key(fragment), COMMIT)
        return [fragment for fragment in held if fragment not in shown]

    def _remove(self, entry: Entry) -> None:
        self.result.removed.append(entry.key)
        self.result.bytes += entry.size
        if self.result.deleted:
            self.location.delete(entry.key)
