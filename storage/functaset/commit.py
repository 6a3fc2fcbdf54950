"""Commits: finished fragments become visible and rows are retired, both at once or not at all.

    moments/<digest>.f8       latent moments of the training split as of a commit
    fragments/<id>/claim      "commit" or "collect"

Of two committers one gets the next number; the other reads the new commit and commits on top of it. The claim decides
whether a fragment is shown or collected. A committer claims a fragment before it commits; gc may take the claim over
from a committer that died, and then makes a commit itself, so that one that was only slow starts again and finds the
claim. A fragment that gc has claimed is never shown, and its name is not used again.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from functa.storage.errors import MissingObject, StorageError
from functa.storage.functaset.committing.finished import finished, put, with_manifest
from functa.storage.functaset.committing.moved import FragmentCollected, followed
from functa.storage.functaset.committing.overlap import LAST_NUMBER, names_of, refuse_overlap, shards_with
from functa.storage.functaset.committing.split_moments import training_moments
from functa.storage.functaset.fragment import Fragment, shown_fragments
from functa.storage.functaset.header import Root, read_root
from functa.storage.functaset.history import (
    Commit,
    FragmentEntry,
    as_ranges,
    as_rows,
    commit_key,
    latest,
    mark_key,
    number_key,
    stored,
)
from functa.storage.functaset.plan import COLLECT, LARGER_SHARDS, Name, claim_key, row_id
from functa.storage.functaset.receipts.moments import Moments
from functa.storage.functaset.records import ObjectRecord, create_record, vouch
from functa.storage.functaset.shards.shard import Shard
from functa.storage.places.location import Location
from functa.storage.places.side_by_side import side_by_side

COMMIT = b"commit"

FEWER = f"{LARGER_SHARDS}, or erase retired rows: functa store gc --erase-retired"


@dataclass(frozen=True)
class _Changes:
    """The arguments of `commit`."""

    fragments: Sequence[str]
    retire: dict[str, set[int]]
    retire_fragments: Collection[str]
    retire_images: set[str]
    erased: bool
    keep_versions: int | None
    whole: dict[str, Moments] = field(default_factory=dict)  # of new fragments, as far as they are known


def commit(
    location: Location,
    fragments: Sequence[str],
    retire: Mapping[str, Iterable[int]] | None = None,
    *,
    retire_fragments: Collection[str] = (),
    retire_images: Iterable[str] = (),
    erased: bool = False,
    keep_versions: int | None = None,
    again: bool = False,
) -> Commit:
    """Make finished fragments visible on top of the newest commit; return the commit that shows them.

    retire: fragment -> rows that this commit and later ones no longer show, wherever a compaction has moved them since.
    retire_fragments: fragments that it no longer names, whole or damaged. retire_images: ids of images that later
    encodings are to leave out; erased: no row of such images is left, so forget their ids. keep_versions: expire all
    versions but the newest so many, this one counted. Fragments that are or were visible already, and rows that are
    retired already, are no change: with nothing else, the newest commit is returned. again: commit although nothing
    changes, so that whoever is committing starts again and looks at the claims. Raises StorageError: an unfinished
    shard, another fingerprint, an image that another fragment shows already, a fragment that gc collects; ValueError:
    no version kept.
    """
    if keep_versions is not None and keep_versions < 1:
        raise ValueError(f"keep_versions {keep_versions}: the newest one is kept at least")
    root = read_root(location)
    rows = {name: set(found) for name, found in (retire or {}).items()}
    changes = _Changes(fragments, rows, retire_fragments, set(retire_images), erased, keep_versions)
    while True:
        parent = latest(location)
        if parent is not None:
            mark(location, parent.version)  # its committer may have been killed before it
        proposal = _proposal(location, root, parent, changes)
        if parent is not None and not again and _shows_the_same(proposal, parent):
            return parent
        if parent is None and not fragments and not again:
            raise StorageError(f"{location.uri}: nothing to commit; encode first")
        before = {entry.fragment for entry in parent.fragments} if parent else set()
        refuse_overlap(location, proposal, {entry.fragment for entry in proposal.fragments} - before)
        moments = training_moments(location, proposal, parent, changes.whole)
        complete = proposal.model_copy(
            update={
                "fragments": tuple(with_manifest(location, entry) for entry in proposal.fragments),
                "moments": moments and moments[0],
                "objects": _own_objects(location, root.field),
            }
        )
        record, named = stored(complete)
        named |= {moments[0].key: moments[1]} if moments else {}
        for key, data in named.items():
            put(location, key, data)
        if create_record(location, commit_key(complete.version), record, FEWER):
            mark(location, complete.version)
            for key, data in named.items():
                put(location, key, data)  # gc may have deleted it before this commit named it
            return complete.model_copy(update={"lists": record.lists})


def _proposal(location: Location, root: Root, parent: Commit | None, changes: _Changes) -> Commit:
    """Return the next commit, still without moments, lists and objects."""
    existing = parent.fragments if parent else ()
    known = {*(entry.fragment for entry in existing), *(parent.retired_fragments if parent else ())}
    repeated = bool(changes.fragments) and known.issuperset(changes.fragments)  # its rows may have the old ones' names
    retire = changes.retire if repeated else followed(location, existing, changes.retire)
    kept = (_retiring(location, entry, retire.get(entry.fragment)) for entry in existing)
    entries = [entry for entry in kept if entry is not None and entry.fragment not in changes.retire_fragments]
    retired = known - {entry.fragment for entry in entries}
    images = {*(parent.retired_images if parent and not changes.erased else ()), *changes.retire_images}
    for name in dict.fromkeys(changes.fragments):
        if name not in known:
            new = _claimed(location, name, root.fingerprint_digest)
            whole, moments = finished(new)
            changes.whole.update({name: moments} if moments is not None else {})
            entry = _without_retired(location, whole, existing, images)
            entries += [entry] if entry else []
            retired |= set() if entry else {name}
    version = parent.version + 1 if parent else 1
    keep = changes.keep_versions or version
    return Commit(
        version=version,
        oldest=max(parent.oldest if parent else 1, version - keep + 1),
        parent=_digest_of(location, parent.version) if parent else None,
        fingerprint=root.fingerprint_digest,
        fragments=tuple(entries),
        lists=(),
        retired_fragments=tuple(sorted(retired)),
        retired_images=tuple(sorted(images)),
        moments=None,
        objects={},
    )


def _shows_the_same(proposal: Commit, parent: Commit) -> bool:
    """Return whether nothing changes, and no version but one that a commit adds would expire."""
    same = proposal.fragments == parent.fragments
    same = same and set(proposal.retired_fragments) == set(parent.retired_fragments)
    same = same and set(proposal.retired_images) == set(parent.retired_images)
    return same and proposal.oldest <= parent.oldest + 1


def _claimed(location: Location, fragment_id: str, fingerprint: str) -> Fragment:
    """Return a new fragment, claimed for a commit."""
    try:
        fragment = Fragment.load(location, fragment_id)
    except MissingObject:
        raise MissingObject(f"fragment {fragment_id}: has no plan; was it collected by gc? Plan it anew") from None
    if fragment.plan.fingerprint != fingerprint:
        raise StorageError(f"{fragment.name}: was planned for another fingerprint; encode it again")
    if not location.create(claim_key(fragment_id), COMMIT) and location.read(claim_key(fragment_id)) == COLLECT:
        raise StorageError(f"{fragment.name}: was collected by gc; run the same command again")
    return fragment


def _without_retired(
    location: Location, entry: FragmentEntry, existing: Sequence[FragmentEntry], images: set[str]
) -> FragmentEntry | None:
    """Return a new fragment's entry without what was retired since it was planned; None if that is all.

    That is images retired by name and, where it replaces another fragment, rows that were retired there. Raises
    StorageError where the other is no longer shown at all, so that none of its rows is shown again.
    """
    fragment = Fragment.load(location, entry.fragment)
    replaces = fragment.plan.replaces.split()
    replaced = [each for each in existing if each.fragment in replaces]
    if len(replaced) < len(replaces):
        raise StorageError(
            f"{fragment.name}: the fragment that it replaces is no longer shown; run the same command again"
        )
    kept = None
    if any(each.retired for each in replaced):
        kept = {name for each in replaced for name in _kept_names(Fragment.committed(location, each))}
    if kept is None and not images:
        return entry
    tables = side_by_side(location, Shard.table, fragment.shards)
    names = [name for table in tables for name in table.names]
    retired = {
        row for row, name in enumerate(names) if name[0].hex() in images or (kept is not None and name not in kept)
    }
    return _retiring(location, entry, retired)


def _kept_names(fragment: Fragment) -> set[Name]:
    """Return the names of the rows that are not retired."""
    return {
        name
        for shard, names in zip(fragment.live, side_by_side(fragment.location, Shard.names, fragment.live), strict=True)
        for name, retired in zip(names, shard.retired, strict=True)
        if not retired
    }


def _retiring(location: Location, entry: FragmentEntry, rows: set[int] | None) -> FragmentEntry | None:
    """Return the entry without these rows; None if no row would be left."""
    if not rows:
        return entry
    plan = Fragment.committed(location, entry).plan  # which bounds the ranges
    before = as_rows(entry.retired)
    if rows <= set(before):
        return entry
    if min(rows) < 0 or max(rows) >= plan.rows:
        raise StorageError(f"fragment {plan.id}: has rows 0 to {plan.rows - 1}; {max(rows)} cannot be retired")
    after = entry.model_copy(update={"retired": as_ranges([*before, *rows])})
    fragment, fresh = Fragment(location, plan, entry), np.array(sorted(rows - set(before)))
    if len(before) + len(fresh) == plan.rows:
        return None
    bad = 0
    for number in np.unique(fresh // plan.shard_rows).tolist():
        shard = fragment.shards[number]
        bad += int(np.isin(shard.bad + shard.first, fresh).sum())
    return after.model_copy(update={"rows": entry.rows - (len(fresh) - bad), "bad": entry.bad - bad})


def _own_objects(location: Location, field: str) -> dict[str, ObjectRecord]:
    keys = ("zarr.json", f"fields/{field}.safetensors", f"fields/{field}.json")
    return {key: vouch(location.read(key)) for key in keys}


def mark(location: Location, version: int) -> None:
    """Write the mark and then the number of an existing commit, unless it has them."""
    if not location.exists(mark_key(version)):
        location.create(mark_key(version), _digest_of(location, version).encode())
    if not location.exists(number_key(version)):
        location.create(number_key(version), b"")


def _digest_of(location: Location, version: int) -> str:
    return hashlib.sha256(location.read(commit_key(version))).hexdigest()


def retire(location: Location, split: str, keys: Collection[str]) -> Commit:
    """Commit that these images are no longer shown, nor encoded again; some may be retired already.

    Raises StorageError naming one that was never shown, or not since its rows were erased or its fragment retired.
    """
    read_root(location)
    keys = set(keys)
    rows = _rows_shown(location, split, keys)
    missing = set(keys) - {key for found in rows.values() for key in found.values()}
    if missing:
        retired = _retired_ids(location, split)
        missing = {key for key in missing if row_id(key) not in retired}
    if missing:
        raise StorageError(
            f"{location.uri}: shows no image '{min(missing)}' in split '{split}'; "
            "Functaset.open(uri).load(split).keys lists the keys that it shows"
        )
    while True:
        with suppress(FragmentCollected):
            made = commit(location, [], rows, retire_images=[row_id(key).hex() for key in keys])
            if not any(_rows_shown(location, split, keys).values()):
                return made
        rows = _rows_shown(location, split, keys)  # another's commit has moved them in between


def _rows_shown(location: Location, split: str, keys: Collection[str]) -> dict[str, dict[int, str]]:
    """Return fragment -> {row: key} of those of the images that the newest version shows."""
    newest, ids = latest(location), {row_id(key) for key in keys}
    entries = [entry for entry in (newest.fragments if newest else ()) if entry.split == split]
    shards = shards_with(location, entries, names_of(ids, 0), names_of(ids, LAST_NUMBER))
    found: dict[str, dict[int, str]] = {}
    for shard, table in zip(shards, side_by_side(location, Shard.table, shards), strict=True):
        rows = {shard.first + row: table.keys[row] for row in np.flatnonzero(shard.visible).tolist()}
        found.setdefault(shard.fragment.id, {}).update({row: key for row, key in rows.items() if key in keys})
    return found


def _retired_ids(location: Location, split: str) -> set[bytes]:
    """Return the ids of images that have rows that the newest version names and does not show."""
    return {
        name
        for fragment in shown_fragments(location, latest(location), split)
        for shard in fragment.shards
        if shard.retired.any()
        for (name, _), retired in zip(shard.names(), shard.retired, strict=True)
        if retired
    }
