"""Compare encoding through Prefect and Dask with bare processes: JSON.

    python benchmarks/dispatching/dask_workers.py --images FOLDER     # groups of a minute, half an hour on 2 cores

The same groups by two bare processes of one thread side by side, by two Dask workers of one thread on a Prefect server
of their own, and by one, in turns. A rate is that of the time in which every worker was busy, from the first shard that
each had written to the last; the time before is listed separately. All must write the same bytes.
"""

import argparse
import json
import os
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.dispatching.bare import side_by_side
from benchmarks.dispatching.rates import lanes, steady_rate
from benchmarks.dispatching.work import (
    SHARDS,
    Work,
    arrays,
    configuration,
    measured,
    parsed,
    parser_of,
    planned_work,
    server,
    through_prefect,
)

SIDES = ("bare", "two workers", "one worker")
WORKERS = 2


def turn(side: str, work: Work) -> tuple[dict[str, float], dict[str, bytes]]:
    """Return one side's figures, and the bytes that it wrote."""
    groups = work.groups[: len(work.groups) // WORKERS] if side == "one worker" else work.groups
    load = os.getloadavg()[0]
    with work.copy() as (job, store):
        begun = time.time()
        if side == "bare":
            stats = side_by_side(job, groups, WORKERS)
        else:
            with server():
                begun = time.time()
                stats, _ = through_prefect(job, groups, "dask", 1 if side == "one worker" else WORKERS)
        found = lanes(stats, groups, store)
        written = arrays(store)
    if len(found) != (1 if side == "one worker" else WORKERS):
        raise SystemExit(f"{side}: the groups were encoded by {len(found)} workers: take longer ones (--seconds)")
    gaps = [later - earlier for lane in found for (earlier, _), (later, _) in pairwise(lane)]
    figures = {
        "images_per_s": steady_rate(found),
        "before_first_group_s": min(each["begun"] for each in stats) - begun,
        "before_steady_s": max(lane[0][0] for lane in found) - begun - median(gaps),
        "group_s": median(each["seconds"] for each in stats), "load": load,
    }  # fmt: skip
    return figures, written


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the row of encoding: medians over the turns, ratios turn by turn."""
    work = planned_work(folder, options, WORKERS)
    shard_rows = work.job.encode.shard_rows
    turns: list[dict[str, dict[str, float]]] = []
    reference: dict[str, bytes] = {}
    for _ in range(options.alternations):
        turns.append({})
        for side in SIDES:
            turns[-1][side], written = turn(side, work)
            reference = reference or written
            if any(reference[name] != data for name, data in written.items()):
                raise SystemExit(f"{side}: wrote other bytes than the first bare processes")
            print(json.dumps({"side": side} | turns[-1][side]), file=sys.stderr, flush=True)

    def middle(name: str) -> dict[str, float]:
        return {side: round(median(each[side][name] for each in turns), 2) for side in SIDES}

    over = {
        peer: [each["two workers"]["images_per_s"] / each[peer]["images_per_s"] for each in turns] for peer in SIDES
    }
    return {
        "name": "dispatch", "piece": "encoding",
        "config": configuration(options) | {"rows_per_group": SHARDS * shard_rows},
        "images_per_s": middle("images_per_s"), "group_s": middle("group_s"),
        "ratio": round(median(over["bare"]), 3), "ratios": [round(ratio, 3) for ratio in over["bare"]],
        "over_one_worker": round(median(over["one worker"]), 3),
        "over_one_worker_each": [round(ratio, 3) for ratio in over["one worker"]],
        "before_first_group_s": middle("before_first_group_s"), "before_steady_s": middle("before_steady_s"),
        "mode": work.mode, "load": middle("load"), "alternations": len(turns), "cpus": os.cpu_count(),
    }  # fmt: skip


if __name__ == "__main__":
    measured(measure, parsed(parser_of(__doc__, groups=2 * WORKERS, alternations=3), lambda _: WORKERS))
