"""Moments of the training split as of a commit: exact, and read from as few objects as possible.

    moments/<digest>.f8

Where a commit only adds fragments, theirs are merged into those of the commit before it. Else all are merged, in the
order of fragments and shards: of a fragment with many shards by blocks, but for blocks with retired rows.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from functa.storage.errors import DamagedObject, MissingObject, StorageError
from functa.storage.functaset.fragment import Fragment, shown_fragments
from functa.storage.functaset.history import Commit, FragmentEntry, TrainingMoments
from functa.storage.functaset.receipts.manifest import blocks_key
from functa.storage.functaset.receipts.moments import Merging, Moments, moments_of
from functa.storage.functaset.records import read_vouched, vouch
from functa.storage.functaset.shards.shard import Shard
from functa.storage.places.location import Location
from functa.storage.places.side_by_side import side_by_side

Stored = tuple[TrainingMoments, bytes]


def training_moments(
    location: Location, proposal: Commit, parent: Commit | None, known: Mapping[str, Moments]
) -> Stored | None:
    """Return the moments of the split's visible rows, and their bytes. known: of whole fragments that are new."""
    entries = _training(proposal)
    before = _training(parent) if parent is not None else ()
    parts: list[Moments] = []
    if parent is not None and before and entries[: len(before)] == before:
        stored = _read(location, parent.moments)
        if stored is not None and entries == before:
            return stored
        if stored is not None:
            parts, entries = [_decoded(stored)], entries[len(before) :]
    fragments = list(shown_fragments(location, proposal.model_copy(update={"fragments": entries})))
    if not fragments and not parts:
        return None
    shapes = [part.mean.shape for part in parts] + [fragment.plan.latent_shape for fragment in fragments]
    for fragment in fragments:
        if fragment.plan.latent_shape != shapes[0]:
            raise StorageError(
                f"fragment {fragment.id}: latents {fragment.plan.latent_shape} beside others of shape {shapes[0]}"
            )
    if len(fragments) == 1 and not parts and fragments[0].id in known and not fragments[0].retired_ranges.size:
        return _encoded(known[fragments[0].id])
    merging = Merging(shapes[0])
    for part in parts:
        merging.add(part)
    for fragment in fragments:
        for part in _parts(fragment):
            merging.add(part)
    return _encoded(merging.moments)


def _training(commit: Commit) -> tuple[FragmentEntry, ...]:
    return tuple(entry for entry in commit.fragments if entry.split == "train")


def _read(location: Location, moments: TrainingMoments | None) -> Stored | None:
    try:
        return None if moments is None else (moments, read_vouched(location, moments.key, moments.object))
    except (MissingObject, DamagedObject):
        return None  # they are merged again


def _decoded(stored: Stored) -> Moments:
    return Moments.from_bytes(stored[1], stored[0].count, stored[0].latent_shape)


def _encoded(moments: Moments) -> Stored:
    data = moments.to_bytes()
    record = vouch(data)
    key = f"moments/{record.sha256[:24]}.f8"
    return TrainingMoments(key=key, count=moments.count, latent_shape=moments.mean.shape, object=record), data


def _parts(fragment: Fragment) -> Iterator[Moments]:
    """Yield the moments of a fragment's visible rows, in parts and in the order of shards."""
    manifest = fragment.manifest
    if manifest is None or manifest.described.blocks is None:
        yield from side_by_side(fragment.location, _shard_moments, fragment.live)
        return
    plan, size, record = fragment.plan, manifest.described.block_shards, manifest.described.blocks
    data = read_vouched(fragment.location, blocks_key(plan.id), record)
    stored = np.frombuffer(data, np.uint8).reshape(-1, 16 * plan.dims)
    good = np.array([plan.shard_size(number) - len(manifest.bad_rows(number)) for number in range(plan.shards)])
    touched = {number // size for number in np.flatnonzero(fragment.retired_counts).tolist()}
    for block, start in enumerate(range(0, plan.shards, size)):
        if block in touched:
            shards = [shard for shard in fragment.live if start <= shard.number < start + size]
            yield from side_by_side(fragment.location, _shard_moments, shards)
        else:
            count = int(good[start : start + size].sum())
            yield Moments.from_bytes(stored[block].tobytes(), count, plan.latent_shape)


def _shard_moments(shard: Shard) -> Moments:
    """Read the stored ones or, of a shard with retired rows, compute those of the rows that are left."""
    if not shard.retired.any():
        return shard.moments()
    return moments_of(shard.fragment.dequantized(shard.array("z")[shard.visible]))
