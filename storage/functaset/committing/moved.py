"""Rows that a compaction or an erasure has moved into another fragment since a commit was planned."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from functa.storage.errors import MissingObject, StorageError
from functa.storage.functaset.committing.overlap import shards_with
from functa.storage.functaset.fragment import Fragment
from functa.storage.functaset.history import FragmentEntry
from functa.storage.functaset.plan import RowTable
from functa.storage.functaset.receipts.manifest import as_names, name_bytes
from functa.storage.functaset.shards.shard import Shard
from functa.storage.places.location import Location
from functa.storage.places.side_by_side import side_by_side


class FragmentCollected(StorageError):
    """A fragment with rows to retire was merged and collected, so that it is not known where they are."""


def followed(
    location: Location, shown: Sequence[FragmentEntry], retire: Mapping[str, set[int]]
) -> Mapping[str, set[int]]:
    """Return the rows to retire, fragment -> rows, where they lie now: of fragments that are no longer shown too.

    A row is the same where it has the name and the image's token: one that was encoded anew since is another one.
    Raises FragmentCollected.
    """
    names = {entry.fragment for entry in shown}
    lost = {fragment: rows for fragment, rows in retire.items() if rows and fragment not in names}
    if not lost:
        return retire
    found = {fragment: set(rows) for fragment, rows in retire.items() if fragment in names}
    for fragment, rows in lost.items():
        old = _planned(location, fragment)
        entries = [entry for entry in shown if entry.split == old.split]
        for shard, moved in _moved(location, entries, _images(old, rows)):
            found.setdefault(shard.fragment.id, set()).update(moved)
    return found


def _planned(location: Location, fragment: str) -> Fragment:
    try:
        return Fragment.load(location, fragment)
    except MissingObject:
        raise FragmentCollected(
            f"fragment {fragment}: was merged and collected since the rows to retire were found; run the same command "
            f"again"
        ) from None


def _images(old: Fragment, rows: Iterable[int]) -> dict[bytes, str]:
    """Return name -> token of these rows of a fragment."""
    chosen = np.array(sorted(rows))
    numbers = chosen // old.plan.shard_rows
    shards = [old.shards[number] for number in np.unique(numbers).tolist()]
    tables = side_by_side(old.location, Shard.table, shards)
    found: dict[bytes, str] = {}
    for shard, table in zip(shards, tables, strict=True):
        here = table.take(chosen[numbers == shard.number] - shard.first)
        found |= dict(zip(map(name_bytes, here.names), here.tokens, strict=True))
    return found


def _moved(
    location: Location, entries: Sequence[FragmentEntry], images: Mapping[bytes, str]
) -> Iterable[tuple[Shard, set[int]]]:
    """Yield the shards that hold these images now, with the numbers of their rows within the fragment."""
    wanted = as_names(sorted(images))
    shards = shards_with(location, entries, wanted, wanted)
    for shard, table in zip(shards, side_by_side(location, Shard.table, shards), strict=True):
        yield shard, {shard.first + row for row in _rows_of(table, images)}


def _rows_of(table: RowTable, images: Mapping[bytes, str]) -> list[int]:
    pairs = zip(map(name_bytes, table.names), table.tokens, strict=True)
    return [row for row, (name, token) in enumerate(pairs) if images.get(name) == token]
