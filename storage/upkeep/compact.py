"""Compaction: small fragments, as many small additions leave them, become one, so that opening and adding stay quick.

Rows, labels, codes, PSNRs and digests of the images stay what they are, byte for byte. One commit shows the new
fragment and retires the old ones. Interrupted, it continues when it is run again; what it wrote before is adopted. The
old ones are collected when the versions that show them have expired: functa store gc --keep-versions 1 --delete.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from functa.storage.errors import StorageError
from functa.storage.functaset.commit import commit
from functa.storage.functaset.fragment import Fragment, shown_fragments
from functa.storage.functaset.header import read_root
from functa.storage.functaset.history import latest
from functa.storage.functaset.zarr_bytes import MAX_CHUNK_BYTES
from functa.storage.places.location import Location
from functa.storage.upkeep.erase import Lengths, rewrite

SMALL = 16  # full shards; a fragment with fewer rows than they hold is small

SHARD_ROWS, CHUNK_ROWS = 1024, 64  # of a new fragment at least, if so many fit


@dataclass(frozen=True)
class Compacted:
    """The result of a compaction: fragments that were merged, the new ones, their rows, and the version shown now."""

    merged: tuple[str, ...]
    made: tuple[str, ...]
    rows: int
    version: int


def compact(location: Location, progress: Callable[[int, int], None] | None = None) -> Compacted:
    """Merge the small fragments of each split. `progress` is called with (fragments merged, all that are to be).

    Raises StorageError: nothing committed, damage, a full disk; or somebody retired one of the fragments meanwhile.
    """
    read_root(location)
    newest = latest(location)
    if newest is None:
        raise StorageError(f"{location.uri}: nothing is committed yet; finish encoding first")
    groups = _groups(list(shown_fragments(location, newest)))
    merged = [fragment for _, group in groups for fragment in group]
    if not groups:
        return Compacted((), (), 0, newest.version)
    location.preflight_write(sum(_bytes(fragment) for fragment in merged))
    made, done = [], 0
    for lengths, group in groups:
        made.append(rewrite(group, lengths))
        done += len(group)
        if progress:
            progress(done, len(merged))
    names = tuple(fragment.id for fragment in merged)
    version = commit(location, [fragment.id for fragment in made], retire_fragments=names).version
    return Compacted(names, tuple(each.id for each in made), sum(each.plan.rows for each in made), version)


def _groups(fragments: list[Fragment]) -> list[tuple[Lengths, list[Fragment]]]:
    """Return two or more small fragments each that can be one, with the lengths of its shards and chunks."""
    groups: dict[Hashable, list[Fragment]] = {}
    for fragment in fragments:
        quantizer = fragment.quantizer
        ranges = quantizer and (quantizer.bits, quantizer.policy, quantizer.low.tobytes(), quantizer.step.tobytes())
        plan = fragment.plan
        groups.setdefault((plan.split, plan.latent_shape, plan.codec, ranges), []).append(fragment)
    found = []
    for group in groups.values():
        fits = MAX_CHUNK_BYTES // (4 * group[0].plan.dims)
        chunk = max(CHUNK_ROWS, *(fragment.plan.chunk_rows for fragment in group))
        longest = max(min(SHARD_ROWS, fits), *(fragment.plan.shard_rows for fragment in group))
        small = [fragment for fragment in group if fragment.plan.rows < SMALL * longest]
        if len(small) > 1:
            found.append((Lengths(longest, chunk), small))
    return found


def _bytes(fragment: Fragment) -> int:
    """Return about as many bytes as the fragment's shards take."""
    plan = fragment.plan
    return round(1.1 * plan.rows * (plan.dims * plan.bits / 8 + 100))
