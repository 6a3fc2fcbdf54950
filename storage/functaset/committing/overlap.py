"""Rows of a split that are shown already: no (split, id, augmentation) is ever visible twice.

Rows lie in the order of their names, so that of a fragment only those shards are read that can hold a name.
"""

from collections.abc import Collection, Sequence

import numpy as np

from functa.storage.errors import StorageError
from functa.storage.functaset.fragment import Fragment
from functa.storage.functaset.history import Commit, FragmentEntry
from functa.storage.functaset.plan import row_id
from functa.storage.functaset.receipts.manifest import as_names, name_bytes
from functa.storage.functaset.shards.shard import Shard
from functa.storage.places.location import Location
from functa.storage.places.side_by_side import side_by_side

LAST_NUMBER = (1 << 31) - 1  # of an augmentation


def refuse_overlap(location: Location, proposal: Commit, new: Collection[str]) -> None:
    """Raise StorageError where one of the new fragments shows a row that another fragment shows."""
    for split in {entry.split for entry in proposal.fragments if entry.fragment in new}:
        entries = [entry for entry in proposal.fragments if entry.split == split]
        others = [entry for entry in entries if entry.fragment not in new]
        seen = as_names([])
        for entry in (entry for entry in entries if entry.fragment in new and len(entries) > 1):
            fragment = Fragment.committed(location, entry)
            names = np.sort(_visible_names(fragment.live))
            shown = _visible_names(shards_with(location, others, names, names))
            twice = names[np.isin(names, shown) | np.isin(names, seen)]
            if len(twice):
                raise StorageError(
                    f"fragment {fragment.id}: {len(twice)} of its images, such as {_key(fragment, twice[0])}, are "
                    f"visible already in split '{split}'; encode them into a new root, or commit only new images"
                )
            seen = np.concatenate([seen, names])


def shards_with(
    location: Location, entries: Sequence[FragmentEntry], first: np.ndarray, last: np.ndarray
) -> list[Shard]:
    """Return the shards that can show a name between first[i] and last[i], for any i; both are sorted."""

    def found(entry: FragmentEntry) -> list[Shard]:
        fragment = Fragment.committed(location, entry)
        if fragment.manifest is None:
            return fragment.live
        wanted = set(fragment.manifest.shards_with(first, last).tolist())
        return [shard for shard in fragment.live if shard.number in wanted]

    near = [entry for entry in entries if _may_hold(entry, first, last)]
    return [shard for shards in side_by_side(location, found, near) for shard in shards]


def _may_hold(entry: FragmentEntry, first: np.ndarray, last: np.ndarray) -> bool:
    if not len(first) or entry.names is None:
        return bool(len(first))
    low, high = as_names([name_bytes((bytes.fromhex(name), number)) for name, number in entry.names])
    return bool(first[0] <= high and low <= last[-1])


def names_of(ids: Collection[bytes], number: int) -> np.ndarray:
    """Return the names of these images' rows of one augmentation, sorted."""
    return as_names([name_bytes((name, number)) for name in sorted(ids)])


def _visible_names(shards: Sequence[Shard]) -> np.ndarray:
    def names(shard: Shard) -> np.ndarray:
        return as_names([name_bytes(name) for name in shard.names()])[shard.visible]

    parts = side_by_side(shards[0].fragment.location, names, shards) if shards else ()
    return np.concatenate([as_names([]), *parts])


def _key(fragment: Fragment, name: np.bytes_) -> str:
    """Return the key of the image that a row's name is of."""
    return next(
        key for _, key, number in fragment.visible_keys() if as_names([name_bytes((row_id(key), number))]) == name
    )
