"""Compare encoding by the workers of a Prefect work pool, without Dask, with as many bare processes: JSON.

    python benchmarks/dispatching/pool_workers.py --images FOLDER --preset cifar10_quick --eager

The same groups by bare processes of one thread side by side, and by as many workers of `functa up` with
dispatch.runner=prefect, in turns. A rate is that of the time in which every worker was busy, from the first shard that
each had written to the last; start-up is listed separately, and so are the seconds between a worker's groups. Both must
write the same bytes. CPU seconds are of all processes, the server's apart.
"""

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.dispatching.bare import side_by_side
from benchmarks.dispatching.rates import between_groups, lanes, steady_rate
from benchmarks.dispatching.work import (
    SHARDS,
    Work,
    arrays,
    configuration,
    measured,
    parsed,
    parser_of,
    planned_work,
    through_prefect,
)


@contextmanager
def pool(root: Path, workers: int) -> Iterator[Callable[[], float]]:
    """Run `functa up` with so many workers of one thread; yield a function that returns the server's CPU seconds."""
    import psutil
    from prefect.context import refresh_global_settings_context

    from functa.flows.server.api import PASSWORD, local_api, password_file

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    code = "from functa.flows.cli.main import main; main()"
    command = [sys.executable, "-c", code, "up", "--port", str(port), "--root", str(root), "--gpus", str(workers)]
    os.environ["PREFECT_HOME"] = str(root.parent / "home")  # a database of its own
    for name in ("PREFECT_API_URL", PASSWORD):  # of the turn before
        os.environ.pop(name, None)
    environment = os.environ | {"OMP_NUM_THREADS": str(workers), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout
    try:
        line = ""
        for line in process.stdout:
            if "Ctrl-C" in line:
                break
        else:
            raise SystemExit(f"`functa up` ended: {line}")
        children = psutil.Process(process.pid).children(recursive=True)
        served = next(child for child in children if "guarded" in " ".join(child.cmdline()))
        os.environ |= {"PREFECT_API_URL": local_api(port), PASSWORD: password_file(port).read_text()}
        refresh_global_settings_context()
        yield lambda: float(sum(sum(each.cpu_times()[:2]) for each in [served, *served.children(recursive=True)]))
    finally:
        process.terminate()
        process.communicate(timeout=120)


def turn(side: str, work: Work, workers: int, folder: Path) -> tuple[dict[str, float], dict[str, bytes]]:
    """Return one side's figures, and the bytes that it wrote."""
    begun, used, load, served = time.time(), cpu_of_children(), os.getloadavg()[0], 0.0
    with work.copy() as (job, store):
        if side == "bare":
            stats = side_by_side(job, work.groups, workers)
        else:
            with pool(folder / "root", workers) as server_cpu:
                begun, before = time.time(), server_cpu()
                stats, _ = through_prefect(job, work.groups, "prefect", workers)
                served = server_cpu() - before
        seconds = time.time() - begun
        found, idle = lanes(stats, work.groups, store), between_groups(stats, work.groups, store)
        written = arrays(store)
    if len(found) != workers:
        raise SystemExit(f"{side}: the groups were encoded by {len(found)} workers: take longer ones (--seconds)")
    figures = {
        "images_per_s": steady_rate(found), "group_s": median(each["seconds"] for each in stats),
        "between_groups_s": median(idle or [0.0]), "before_steady_s": max(lane[0][0] for lane in found) - begun,
        "seconds": seconds, "cpu_s": cpu_of_children() - used, "server_cpu_s": served, "load": load,
    }  # fmt: skip
    return {name: round(value, 3) for name, value in figures.items()}, written


def cpu_of_children() -> float:
    """Return the CPU seconds of the processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the row of a pool: figures of each side turn by turn, and the ratio of the rates."""
    work = planned_work(folder, options, options.workers)
    turns: list[dict[str, dict[str, float]]] = []
    for _ in range(options.alternations):
        turns.append({})
        written: dict[str, dict[str, bytes]] = {}
        for side in ("bare", "pool"):
            turns[-1][side], written[side] = turn(side, work, options.workers, folder)
            print(json.dumps({"side": side} | turns[-1][side]), file=sys.stderr, flush=True)
        if written["bare"] != written["pool"]:
            raise SystemExit("the pool's workers wrote other bytes than bare processes")
    ratios = [each["pool"]["images_per_s"] / each["bare"]["images_per_s"] for each in turns]
    return {
        "name": "dispatch", "piece": "pool", "workers": options.workers,
        "config": configuration(options) | {"rows_per_group": SHARDS * work.job.encode.shard_rows},
        "turns": turns, "ratio": round(median(ratios), 3), "ratios": [round(ratio, 3) for ratio in ratios],
        "mode": work.mode, "cpus": os.cpu_count(),
    }  # fmt: skip


if __name__ == "__main__":
    parser = parser_of(__doc__, groups=9, alternations=2)
    parser.set_defaults(seconds=30.0)
    parser.add_argument("--workers", type=int, default=3, help="of the pool, and bare processes")
    measured(measure, parsed(parser, lambda options: options.workers))
