"""Hydrating: a remote or compressed functaset's shards as raw local files, which Mapped maps (storage/hydrated.py)."""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from storage.errors import StorageError
from storage.fragments import read_array
from storage.functaset import Functaset
from storage.hydrated import ARRAYS, HydratedFragment, HydratedShard, default_folder, sha256_of
from storage.locations import open_location
from storage.records import ObjectRecord, seal
from storage.shards import Shard, SplitShards


@dataclass(frozen=True)
class Hydration:
    """What a call did: where, how many shards there are, how many of them it wrote, and the bytes of these."""

    folder: str
    shards: int
    written: int
    bytes: int


def hydrate(
    functaset: Functaset, folder: str | None = None, progress: Callable[[int, int, int], None] | None = None
) -> Hydration:
    """Write every visible shard's rows of every split as raw local files, each object checked against its receipt.

    What stands is checked and kept; what is damaged is written again; a call after an interruption goes on. Called
    before and after each shard: progress(shards done, shards in all, bytes written). Raises StorageError: no room
    (before anything is written), a damaged object of the functaset, a place that cannot be written to.
    """
    place = default_folder() if folder is None else folder
    inside = open_location(place).uri
    if inside == functaset.location.uri or inside.startswith(f"{functaset.location.uri}/"):
        raise StorageError(f"{place}: lies in the functaset itself; choose another folder")
    fragments = fragments_of(functaset, place)
    left = [(fragment, shard) for fragment, shards in fragments for shard in shards if not _whole(fragment, shard)]
    total = sum(len(shards) for _, shards in fragments)
    with _told(place):
        os.makedirs(place, exist_ok=True)
        open_location(place).preflight_write(sum(_bytes(fragment, shard) for fragment, shard in left))
        written = 0
        for number, (fragment, shard) in enumerate(left):
            if progress:
                progress(total - len(left) + number, total, written)
            _write(fragment, shard)
            written += _bytes(fragment, shard)
    if progress:
        progress(total, total, written)
    return Hydration(place, total, len(left), written)


def fragments_of(functaset: Functaset, folder: str) -> list[tuple[HydratedFragment, list[Shard]]]:
    """Every fragment that has rows to show, with its shards."""
    splits = dict.fromkeys(entry.split for entry in functaset.commit.fragments)
    found = []
    for split in splits:
        for _, group in groupby(SplitShards(functaset, split).shards, key=lambda shard: shard.plan.id):
            shards = list(group)
            found.append((HydratedFragment.of(folder, shards[0]), shards))
    return found


def _bytes(fragment: HydratedFragment, shard: Shard) -> int:
    return sum(fragment.row_bytes(array) for array in ARRAYS) * shard.receipt.rows


def _whole(fragment: HydratedFragment, shard: Shard) -> bool:
    """Whether the shard's rows stand as its record says."""
    if not fragment.stands(shard):
        return False
    try:
        fragment.check(shard, {array: fragment.mapped(array) for array in ARRAYS})
        return True
    except StorageError:
        with suppress(StorageError):  # it vouches for what is not there
            fragment.location.delete(fragment.key(shard))
        return False


def _write(fragment: HydratedFragment, shard: Shard) -> None:
    raw = {}
    for array in ARRAYS:
        rows = np.ascontiguousarray(read_array(shard.location, shard.plan, shard.receipt, array))
        start = shard.receipt.shard * shard.plan.shard_rows
        _put(fragment.path(array), rows, start * fragment.row_bytes(array), fragment)
        raw[array] = ObjectRecord(bytes=rows.nbytes, sha256=sha256_of(rows))
    record = HydratedShard(
        fragment=shard.plan.id, shard=shard.receipt.shard, rows=shard.receipt.rows,
        source={array: shard.object(array)[1] for array in ARRAYS}, raw=raw,
    )  # fmt: skip
    fragment.location.create(fragment.key(shard), seal(record))


def _put(path: Path, rows: np.ndarray, offset: int, fragment: HydratedFragment) -> None:
    """Rows at their place in the fragment's file, durable once the call returns."""
    path.parent.mkdir(exist_ok=True)
    # Not followed where it is a link: in a folder that others can write to, it could lead anywhere.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        size = fragment.plan.rows * fragment.row_bytes(path.stem)
        if os.fstat(descriptor).st_size != size:
            os.ftruncate(descriptor, size)
        view = rows.reshape(-1).data.cast("B")
        while view:
            count = os.pwrite(descriptor, view, offset)
            view, offset = view[count:], offset + count
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _told:
    """Within, an OSError becomes a StorageError of one line."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __enter__(self) -> None: ...

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, OSError):
            mend = "free some space or give this user the right to it, or choose another folder with --to"
            raise StorageError(f"{self.place}: {error.strerror or error}; {mend}") from error
