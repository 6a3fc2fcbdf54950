"""Measure a group of work without work, by threads and by Dask workers: JSON.

    python benchmarks/dispatching/empty_groups.py --empty 10,30

Every shard exists; the figure is per group after each worker's first.
"""

import argparse
import os
import sys
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.dispatching.bare import encode_bare
from benchmarks.dispatching.work import Work, measured, parsed, parser_of, server, through_prefect

WORKERS = 2


def measure(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each runner: seconds per finished group, by the number of groups."""
    counts = sorted(map(int, options.empty.split(",")))
    work = Work(folder, argparse.Namespace(**vars(options) | {"eager": True}), 4, counts[-1], 1)
    job = work.job
    encode_bare(job, work.groups, 1)
    found: dict[str, dict[int, list[dict[str, float]]]] = {}
    with server():
        for _ in range(options.alternations):
            for runner in ("threads", "dask"):
                for count in counts:
                    stats, seconds = through_prefect(job, work.groups[:count], runner, WORKERS)
                    assert not any(each["images"] for each in stats)
                    begun = sorted(each["begun"] for each in stats)[WORKERS:]
                    each = {"per_group": (begun[-1] - begun[0]) / max(1, len(begun) - 1), "in_all": seconds}
                    found.setdefault(runner, {}).setdefault(count, []).append(each)
    return [_row(runner, by_count, options) for runner, by_count in found.items()]


def _row(runner: str, by_count: dict[int, list[dict[str, float]]], options: argparse.Namespace) -> dict[str, Any]:
    figures = {
        name: {str(count): round(median(each[name] for each in turns), 4) for count, turns in by_count.items()}
        for name in ("per_group", "in_all")
    }
    first, *_, last = figures["per_group"].values()
    return {
        "name": "dispatch", "piece": "empty groups", "runner": runner, "workers": WORKERS,
        "seconds_per_group": figures["per_group"], "seconds_in_all": figures["in_all"],
        "ratio": round(last / max(1e-9, first), 2), "alternations": options.alternations, "cpus": os.cpu_count(),
    }  # fmt: skip


if __name__ == "__main__":
    parser = parser_of(__doc__, groups=WORKERS, alternations=3)
    parser.add_argument("--empty", default="10,30,100,300", help="numbers of empty groups, two at least")
    measured(measure, parsed(parser, lambda _: WORKERS))
