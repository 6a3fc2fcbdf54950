"""Rates of workers that share groups of shards, by the times at which their shards were written."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from functa.tasks.encoding.plan import ShardGroup

Stats = list[dict[str, Any]]

Groups = Sequence["ShardGroup"]

Lane = list[tuple[float, int]]  # of a worker: (seconds since the epoch, images so far) after every shard


class Encoded(NamedTuple):
    """A group: when it began, when each of its shards was written (seconds since the epoch), and a shard's rows."""

    begun: float
    ends: list[float]
    rows: int


def by_worker(stats: Stats, groups: Groups, store: Path) -> list[list[Encoded]]:
    """Return each worker's groups in their order: one begins where the worker that ended last is free."""
    found: list[list[Encoded]] = []
    for each, group in sorted(zip(stats, groups), key=lambda pair: pair[0]["begun"]):
        receipts = store / "fragments" / group.fragment / "receipts"
        ends = sorted((receipts / f"{shard:06d}.0.json").stat().st_mtime for shard in group.shards)
        free = [worker for worker in found if worker[-1].ends[-1] <= each["begun"]]
        if not free:
            found.append(worker := [])
        else:
            worker = max(free, key=lambda worker: worker[-1].ends[-1])
        worker.append(Encoded(each["begun"], ends, each["images"] // len(ends)))
    return found


def lanes(stats: Stats, groups: Groups, store: Path) -> list[Lane]:
    """Return each worker's (seconds since the epoch, images so far) after every shard, by the receipts' times."""
    found: list[Lane] = []
    for worker in by_worker(stats, groups, store):
        rows = np.cumsum([encoded.rows for encoded in worker for _ in encoded.ends]).tolist()
        found.append(list(zip((end for encoded in worker for end in encoded.ends), rows)))
    return found


def between_groups(stats: Stats, groups: Groups, store: Path) -> list[float]:
    """Return the seconds from the last shard of each worker's group to the start of its next one."""
    return [
        later.begun - earlier.ends[-1]
        for worker in by_worker(stats, groups, store)
        for earlier, later in pairwise(worker)
    ]


def steady_rate(found: list[Lane]) -> float:
    """Return images per second of all workers together, while all of them are busy."""
    begin, end = max(lane[0][0] for lane in found), min(lane[-1][0] for lane in found)
    done = [np.interp([begin, end], *map(np.asarray, zip(*lane))) for lane in found]
    return float(sum(after - before for before, after in done) / (end - begin))
