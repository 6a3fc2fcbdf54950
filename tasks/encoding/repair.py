"""Repair a functaset: encode the rows of damaged shards into new fragments; one commit replaces the damaged rows."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np

from functa.storage.errors import StorageError
from functa.storage.functaset.commit import commit, mark
from functa.storage.functaset.committing.restoring import restore_manifest, restore_receipt
from functa.storage.functaset.fragment import Fragment
from functa.storage.functaset.header import FRAGMENTS, put_fragments_group
from functa.storage.functaset.history import FragmentEntry, latest
from functa.storage.functaset.plan import Name, fragment_path
from functa.storage.functaset.quantizer import Quantizer
from functa.storage.functaset.receipts.manifest import contents_of, manifest_key
from functa.storage.functaset.receipts.receipt import Receipt, receipt_name, sum_of_contents
from functa.storage.functaset.records import read_vouched, unseal
from functa.storage.functaset.shards.shard import Shard
from functa.storage.places.local import may_pass
from functa.storage.places.location import Location
from functa.storage.places.side_by_side import side_by_side
from functa.storage.upkeep.verify import verify
from functa.tasks.encoding.keyed_images import Former

Found = TypeVar("Found")

OF_SHARD = re.compile(
    r"fragments/([0-9a-f]{24})/(?:(?:rows|receipts|moments)/(\d{6,})\.|(?!quantization)\w+/c/(\d+)(?:/|$))"
)

OF_FRAGMENT = re.compile(r"fragments/([0-9a-f]{24})/")

MOMENTS = re.compile(r"moments/[0-9a-f]{24}\.f8")

COMMIT = re.compile(r"commits/\d{8}\.json")

MARK = re.compile(r"commits/(\d{8})\.sha256")


@dataclass
class Damage:
    """The damage that verify found: shards by fragment, whole fragments, and objects that can be computed again.

    The latter are merged moments, marks of older commits and the group of fragments.
    """

    shards: dict[str, set[int]] = field(default_factory=dict)
    fragments: set[str] = field(default_factory=set)
    moments: list[str] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    group: bool = False


@dataclass
class Wanted:
    """The rows of one damaged fragment that are to be encoded again.

    rows: None if the plan is damaged: then all images of the split that are not visible, and the result must have this
    content digest. quantizer: None if there is none or it is damaged. retire: rows of the fragment.
    """

    entry: FragmentEntry
    rows: dict[Name, Former] | None
    quantizer: Quantizer | None
    retire: list[int]
    content: str = ""


def restore_records(location: Location) -> None:
    """Write damaged manifests again from the receipts, and damaged receipts from whole manifests."""
    newest = latest(location)
    for entry in newest.fragments if newest else ():
        fragment = _readable(location, partial(Fragment.committed, location, entry))
        if fragment is None or entry.manifest is None:
            continue
        if _readable(location, partial(restore_manifest, fragment)):
            for _ in side_by_side(location, partial(_restored, location), fragment.live):
                pass


def _restored(location: Location, shard: Shard) -> None:
    _readable(location, partial(restore_receipt, shard))


def find_damage(location: Location) -> Damage:
    """Read every object again and return the damage. Raises StorageError for damage that encoding cannot repair.

    A damaged older commit is no error: it can be expired (gc --keep-versions).
    """
    damage, newest = Damage(), latest(location)
    for bad in verify(location, deep=True).bad:
        if match := OF_SHARD.match(bad["path"]):
            damage.shards.setdefault(match[1], set()).add(int(match[2] or match[3]))
        elif match := OF_FRAGMENT.match(bad["path"]):
            damage.fragments.add(match[1])
        elif MOMENTS.fullmatch(bad["path"]):
            damage.moments.append(bad["path"])
        elif match := MARK.fullmatch(bad["path"]):
            damage.marks.append(int(match[1]))
        elif bad["path"] == FRAGMENTS:
            damage.group = True
        elif not (newest and COMMIT.fullmatch(bad["path"])):
            raise StorageError(f"{location.uri}/{bad['path']}: {bad['fault']}; encoding again does not bring it back")
    return damage


def put_back(location: Location, damage: Damage) -> None:
    """Restore what needs no image. Moments only if no shard is damaged: else the repair's commit merges them again."""
    for version in damage.marks:
        mark(location, version)
    if damage.group:
        put_fragments_group(location)
    if damage.moments and not (damage.shards or damage.fragments):
        commit(location, [], again=True)


def wanted_rows(location: Location, damage: Damage, retire_lost: bool = False) -> list[Wanted]:
    """Return what must be encoded again, by damaged fragment. Retired rows stay retired.

    Raises StorageError if the content of a shard is unknown; with retire_lost its rows are retired.
    """
    newest = latest(location)
    assert newest is not None  # verify refuses a functaset without commits
    return [
        _of_fragment(location, entry)
        if entry.fragment in damage.fragments
        else _of_shards(location, entry, sorted(damage.shards[entry.fragment]), retire_lost)
        for entry in newest.fragments
        if entry.fragment in damage.fragments or entry.fragment in damage.shards
    ]


def _of_fragment(location: Location, entry: FragmentEntry) -> Wanted:
    """Return all rows of a fragment that will be retired as a whole, from what is readable of its plan."""
    try:
        fragment = Fragment.committed(location, entry)
    except StorageError as error:
        if may_pass(location, error):
            raise
        if entry.retired:  # encoding all that is not shown would bring them back
            raise StorageError(
                f"{location.uri}/{fragment_path(entry.fragment)}: its plan is damaged, so that it is not known which "
                "images were retired; restore its plan.json from a copy"
            ) from None
        return Wanted(entry, None, None, [], _content(location, entry))
    rows: dict[Name, Former] = {}
    for shard in fragment.live:
        rows |= _former(shard)
    return Wanted(entry, rows, _readable(location, lambda: fragment.quantizer), [])


def _content(location: Location, entry: FragmentEntry) -> str:
    """Return the content digest of a fragment without a plan, from what its commit names."""
    if entry.manifest is not None:
        key = manifest_key(entry.fragment)
        return sum_of_contents(contents_of(read_vouched(location, key, entry.manifest), f"{location.uri}/{key}"))
    keys = [f"{fragment_path(entry.fragment)}/{receipt_name(shard)}" for shard in range(len(entry.receipts))]
    return sum_of_contents(
        unseal(read_vouched(location, key, record), f"{location.uri}/{key}", Receipt).content
        for key, record in zip(keys, entry.receipts, strict=True)
    )


def _of_shards(location: Location, entry: FragmentEntry, numbers: list[int], retire_lost: bool) -> Wanted:
    fragment = Fragment.committed(location, entry)
    shards = [fragment.shards[number] for number in numbers]
    retire = [shard.first + row for shard in shards for row in range(shard.size)]
    rows: dict[Name, Former] = {}
    for shard in shards:
        try:
            rows |= _former(shard)
        except StorageError as error:
            if may_pass(location, error) or not retire_lost:
                raise
    return Wanted(entry, rows, fragment.quantizer, retire)


def _former(shard: Shard) -> dict[Name, Former]:
    """Return the visible rows by name. If the receipt is damaged, bad rows are included: they are not known."""
    location, names, seen = shard.fragment.location, shard.names(), ~shard.retired
    table = _readable(location, shard.table)
    columns = {}
    if _readable(location, lambda: shard.receipt) is not None:
        seen = shard.visible
        for name in ("source_sha256", "label"):
            columns[name] = _readable(location, partial(shard.array, name))
    sha256, labels = columns.get("source_sha256"), columns.get("label")
    labels = labels if table is None else table.labels
    return {
        names[row]: Former(
            key="" if table is None else table.keys[row],
            token=None if table is None else table.tokens[row],
            sha256=None if sha256 is None else bytes(sha256[row]),
            label=None if labels is None else int(labels[row]),
        )
        for row in np.flatnonzero(seen).tolist()
    }


def _readable(location: Location, read: Callable[[], Found]) -> Found | None:
    """Return what `read` returns, or None if it is damaged."""
    try:
        return read()
    except StorageError as error:
        if may_pass(location, error):
            raise
        return None


def held_names(location: Location, split: str, damage: Damage) -> set[tuple[str, int]]:
    """Return (key, augmentation) of all rows in undamaged shards that are not retired, bad ones too."""
    held: set[tuple[str, int]] = set()
    newest = latest(location)
    for entry in newest.fragments if newest else ():
        if entry.split == split and entry.fragment not in damage.fragments:
            broken = damage.shards.get(entry.fragment, set())
            for shard in Fragment.committed(location, entry).live:
                if shard.number not in broken:
                    table = shard.table().take(np.flatnonzero(~shard.retired))
                    held |= set(zip(table.keys, table.augmentations.tolist(), strict=True))
    return held


def other_images(fragment: str) -> StorageError:
    """Return the error for a fragment whose plan is damaged and whose images cannot all be found again."""
    return StorageError(
        f"fragment {fragment}: its plan is damaged, and the images that are not encoded elsewhere are not those that "
        f"it held (some are new, missing, changed or erased); restore its plan.json from a copy"
    )
