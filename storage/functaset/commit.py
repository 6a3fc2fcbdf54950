"""Making a commit: finished fragments become visible, rows are retired, both at once or not at all.

    moments/<digest>.f8       latent moments of the training split as of a commit
    fragments/<id>/claim      "commit" or "collect"

The claim says whether a fragment is to be shown or removed. Who commits lays claim to it before the commit is made;
gc may take that over from a committer that died, and then makes a commit itself, so that one who was only slow begins
anew and sees. A fragment that gc has claimed is never shown, and its name is not used again.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence

from functa.storage.errors import DamagedObject, MissingObject, StorageError
from functa.storage.functaset.fragment import (
    committed_plan,
    committed_receipt,
    live_shards,
    read_array,
    read_moments,
    retired_rows,
    row_names,
    visible_keys,
    visible_names,
    visible_rows,
)
from functa.storage.functaset.header import read_root
from functa.storage.functaset.history import (
    Commit,
    CommittedFragment,
    TrainingMoments,
    as_ranges,
    as_rows,
    commit_key,
    latest,
    mark_key,
)
from functa.storage.functaset.moments import Moments, merge, moments_of
from functa.storage.functaset.plan import COLLECT, Name, Plan, claim_key, load_plan, load_quantizer, plan_rows, row_id
from functa.storage.functaset.records import ObjectRecord, seal, vouch
from functa.storage.functaset.shard import Receipt, read_receipt, receipt_key
from functa.storage.places.location import Location

COMMIT = b"commit"


def commit(
    location: Location,
    fragment_ids: Sequence[str],
    retire: Mapping[str, Iterable[int]] | None = None,
    *,
    drop: Collection[str] = (),
    keep_versions: int | None = None,
    again: bool = False,
    bar: Iterable[str] = (),
    unbar: bool = False,
) -> Commit:
    """Make finished fragments visible on top of the newest commit; return the commit that shows them.

    retire: fragment -> rows that this commit and later ones no longer show. drop: fragments that it no longer names,
    whole or damaged. keep_versions: give up all versions but the newest so many, this one counted. bar: ids of images
    that later encodings are to leave out; unbar: forget all of those. Fragments that are or were visible
    already, and rows that are retired already, are no change: with nothing else, the standing commit comes back.
    again: commit although nothing changes, so that whoever is committing begins anew and looks at the claims. Of two
    committers one wins and the other commits on top. Raises StorageError: an unfinished shard, another fingerprint, an
    image that another fragment shows already, a fragment that gc removes; ValueError: no version kept.
    """
    if keep_versions is not None and keep_versions < 1:
        raise ValueError(f"keep_versions {keep_versions}: the newest one is kept at least")
    root = read_root(location)
    gone = {name: set(rows) for name, rows in (retire or {}).items()}
    while True:
        parent = latest(location)
        if parent is not None:
            mark(location, parent.version)  # its committer may have been killed before it
        standing = parent.fragments if parent else ()
        kept = [_retiring(location, entry, gone.get(entry.fragment)) for entry in standing]
        entries = [entry for entry in kept if entry is not None and entry.fragment not in drop]
        names = {entry.fragment for entry in standing}
        withdrawn = {*(parent.withdrawn if parent else ()), *(names - {entry.fragment for entry in entries})}
        new = [name for name in dict.fromkeys(fragment_ids) if name not in names | withdrawn]
        barred = {*(parent.barred if parent and not unbar else ()), *bar}
        carried = {
            name: _carried(location, _entry(location, name, root.fingerprint_digest), standing, barred) for name in new
        }
        entries += [entry for entry in carried.values() if entry is not None]
        withdrawn |= {name for name, entry in carried.items() if entry is None}
        keep = keep_versions or (parent.version if parent else 1) + 1
        same = parent is not None and (tuple(entries), withdrawn) == (standing, set(parent.withdrawn))
        same = same and parent is not None and barred == set(parent.barred)
        same = same and parent is not None and parent.version - keep < parent.oldest
        if parent is not None and same and not again:
            return parent
        if parent is None and not new and not again:
            raise StorageError(f"{location.uri}: nothing to commit; encode first")
        _refuse_overlap(location, entries, new)
        version = parent.version + 1 if parent else 1
        moments = _merged_moments(location, entries)
        proposal = Commit(
            version=version,
            oldest=max(parent.oldest if parent else 1, version - keep + 1),
            parent=_digest_of(location, parent.version) if parent else None,
            fingerprint=root.fingerprint_digest,
            fragments=tuple(entries),
            withdrawn=tuple(sorted(withdrawn)),
            barred=tuple(sorted(barred)),
            moments=_placed(location, moments),
            objects=_own_objects(location, root.field),
        )
        if location.create(commit_key(version), seal(proposal)):
            mark(location, version)
            _placed(location, moments)  # gc may have taken what stood there before this commit named it
            return proposal


def retire(location: Location, split: str, keys: Collection[str]) -> Commit:
    """Commit that these images are no longer shown, nor encoded again; some may be retired already.

    Raises StorageError naming one that was never shown, or not since fragments were rewritten or withdrawn.
    """
    read_root(location)
    rows = _rows_shown(location, split, keys)
    missing = set(keys) - {key for found in rows.values() for key in found.values()}
    if missing:
        retired = _retired_ids(location, split)
        missing = {key for key in missing if row_id(key) not in retired}
    if missing:
        raise StorageError(
            f"{location.uri}: shows no image '{min(missing)}' in split '{split}'; "
            "Functaset.open(uri).load(split).keys are the keys that there are"
        )
    while True:
        made = commit(location, [], rows, bar=[row_id(key).hex() for key in keys])
        # Another's commit may have moved the rows into other fragments in between.
        rows = _rows_shown(location, split, keys)
        if not any(rows.values()):
            return made


def _rows_shown(location: Location, split: str, keys: Collection[str]) -> dict[str, dict[int, str]]:
    """fragment -> {row: key} of those of the images that the newest version shows."""
    newest = latest(location)
    rows: dict[str, dict[int, str]] = {}
    for entry in newest.fragments if newest else ():
        if entry.split == split:
            shown = visible_keys(location, entry, committed_plan(location, entry))
            rows[entry.fragment] = {row: key for row, key, _ in shown if key in keys}
    return rows


def _retired_ids(location: Location, split: str) -> set[bytes]:
    """Of the images that have rows that the newest version names and does not show."""
    newest = latest(location)
    ids: set[bytes] = set()
    for entry in newest.fragments if newest else ():
        plan = committed_plan(location, entry)
        for shard in range(plan.shards) if entry.split == split and entry.retired else ():
            retired = retired_rows(entry, plan, shard)
            names = row_names(location, entry, plan, shard) if retired.any() else ()
            ids |= {name for (name, _), gone in zip(names, retired) if gone}
    return ids


def mark(location: Location, version: int) -> None:
    """Put the mark of a commit that stands, unless there is one."""
    if not location.exists(mark_key(version)):
        location.create(mark_key(version), _digest_of(location, version).encode())


def _digest_of(location: Location, version: int) -> str:
    return hashlib.sha256(location.read(commit_key(version))).hexdigest()


def _retiring(location: Location, entry: CommittedFragment, rows: set[int] | None) -> CommittedFragment | None:
    """The entry without these rows; None if no row would be left."""
    if not rows:
        return entry
    plan = committed_plan(location, entry)  # which bounds the ranges
    before = as_rows(entry.retired)
    if rows <= set(before):
        return entry
    if min(rows) < 0 or max(rows) >= plan.rows:
        raise StorageError(f"fragment {plan.id}: has rows 0 to {plan.rows - 1}; {max(rows)} cannot be retired")
    after = entry.model_copy(update={"retired": as_ranges([*before, *rows])})
    live = live_shards(after, plan)
    if not live:
        return None
    visible = bad = 0
    for shard in live:  # of the others nothing need be readable
        receipt = committed_receipt(location, entry, plan, shard)
        visible += int(visible_rows(after, plan, receipt).sum())
        bad += int((~retired_rows(after, plan, shard))[list(receipt.bad)].sum())
    return after.model_copy(update={"rows": visible, "bad": bad})


def _carried(
    location: Location, entry: CommittedFragment, standing: Sequence[CommittedFragment], barred: set[str]
) -> CommittedFragment | None:
    """A new fragment's entry without what was retired since it was planned; None if that is all.

    That is images retired by name and, where it replaces another fragment, rows that were retired there. Raises
    StorageError where the other is no longer shown at all, so that none of its rows comes back.
    """
    plan = load_plan(location, entry.fragment)
    replaced = next((each for each in standing if each.fragment == plan.replaces), None)
    if plan.replaces and replaced is None:
        raise StorageError(
            f"{location.uri}/{plan.path}: the fragment that it replaces is no longer shown; run the same command again"
        )
    kept = _kept_names(location, replaced) if replaced is not None and replaced.retired else None
    if kept is None and not barred:
        return entry
    names = [name for shard in range(plan.shards) for name in plan_rows(location, plan, shard).names]
    gone = {row for row, name in enumerate(names) if name[0].hex() in barred or (kept is not None and name not in kept)}
    return _retiring(location, entry, gone)


def _kept_names(location: Location, entry: CommittedFragment) -> set[Name]:
    """Of the rows that are not retired."""
    plan = committed_plan(location, entry)
    names: set[Name] = set()
    for shard in live_shards(entry, plan):
        retired = retired_rows(entry, plan, shard)
        named = row_names(location, entry, plan, shard)
        names |= {name for name, is_gone in zip(named, retired, strict=True) if not is_gone}
    return names


def _own_objects(location: Location, field: str) -> dict[str, ObjectRecord]:
    keys = ("zarr.json", f"fields/{field}.safetensors", f"fields/{field}.json")
    return {key: vouch(location.read(key)) for key in keys}


def _entry(location: Location, fragment_id: str, fingerprint: str) -> CommittedFragment:
    """The fragment's entry, once every shard has its receipt and every object its length."""
    try:
        plan = load_plan(location, fragment_id)
    except MissingObject:
        raise MissingObject(f"fragment {fragment_id}: has no plan; was it removed by gc? Plan it anew") from None
    if plan.fingerprint != fingerprint:
        raise StorageError(f"{location.uri}/{plan.path}: was planned for another fingerprint; encode it again")
    if not location.create(claim_key(plan.id), COMMIT) and location.read(claim_key(plan.id)) == COLLECT:
        raise StorageError(f"{location.uri}/{plan.path}: was removed by gc; run the same command again")
    receipts = [_finished(location, plan, shard) for shard in range(plan.shards)]
    bad = sum(len(receipt.bad) for receipt in receipts)
    return CommittedFragment(
        fragment=plan.id, split=plan.split, rows=plan.rows - bad, bad=bad, retired=(),
        plan=vouch(location.read(f"{plan.path}/plan.json")),
        receipts=tuple(vouch(location.read(receipt_key(plan, shard))) for shard in range(plan.shards)),
    )  # fmt: skip


def _finished(location: Location, plan: Plan, shard: int) -> Receipt:
    receipt = read_receipt(location, plan, shard)
    if receipt is None:
        raise StorageError(f"fragment {plan.id}: shard {shard} of {plan.shards} is not finished; encode it first")
    for key, record in receipt.objects.items():
        if location.size(f"{plan.path}/{key}") != record.bytes:
            raise DamagedObject(
                f"{location.uri}/{plan.path}/{key}: is missing or short; restore it, or encode in a new root"
            )
    return receipt


def _refuse_overlap(location: Location, entries: list[CommittedFragment], new: list[str]) -> None:
    """No (split, id, augmentation) is ever visible twice."""
    for split in {entry.split for entry in entries if entry.fragment in new}:
        seen: dict[Name, str] = {}
        of_split = [entry for entry in entries if entry.split == split]
        if len(of_split) < 2:
            continue
        for entry in of_split:
            mine = visible_names(location, entry, committed_plan(location, entry))
            twice = seen.keys() & mine.keys()
            if twice:
                raise StorageError(
                    f"fragment {entry.fragment}: {len(twice)} of its images, such as {mine[min(twice)]}, are visible "
                    f"already in split '{split}'; encode them into a new root, or commit only new images"
                )
            seen |= mine


def _merged_moments(location: Location, entries: list[CommittedFragment]) -> Moments | None:
    """Of the training split: merged from the shards' own, in the order of fragments and shards."""
    parts: list[Moments] = []
    shape = None
    for entry in (entry for entry in entries if entry.split == "train"):
        plan = committed_plan(location, entry)
        if shape not in (None, plan.latent_shape):
            raise StorageError(f"fragment {plan.id}: latents {plan.latent_shape} beside others of shape {shape}")
        shape = plan.latent_shape
        parts += [_shard_moments(location, entry, plan, shard) for shard in live_shards(entry, plan)]
    return None if shape is None else merge(parts, shape)


def _placed(location: Location, moments: Moments | None) -> TrainingMoments | None:
    """Puts moments under the digest of their bytes."""
    if moments is None:
        return None
    data = moments.to_bytes()
    key = f"moments/{hashlib.sha256(data).hexdigest()[:24]}.f8"
    while not location.create(key, data) and _differs(location, key, data):
        location.delete(key)  # damaged, or taken by gc meanwhile: its name is the digest of what belongs there
    return TrainingMoments(key=key, count=moments.count, latent_shape=moments.mean.shape, object=vouch(data))


def _differs(location: Location, key: str, data: bytes) -> bool:
    try:
        return location.read(key, limit=len(data)) != data
    except (MissingObject, DamagedObject):
        return True


def _shard_moments(location: Location, entry: CommittedFragment, plan: Plan, shard: int) -> Moments:
    """The receipt's, or, of a shard that lost rows, those of what is left."""
    receipt = committed_receipt(location, entry, plan, shard)
    if not retired_rows(entry, plan, shard).any():
        return read_moments(location, plan, receipt)
    z = read_array(location, plan, receipt, "z")[visible_rows(entry, plan, receipt)]
    quantizer = load_quantizer(location, plan)
    return moments_of(quantizer.decode(z) if quantizer else z)
