"""Let four processes write one fragment at once, and kill them with SIGKILL at random until enough have died.

Run as a process of its own: it forks the writers, so zarr's event loop must not run here yet.
Prints the number of writers killed at work: python -m tests.helpers.storage.crowd FOLDER KILLS SEED
"""

import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import safetensors.numpy  # noqa: F401  imported before the forks, for speed
import zarr.codecs
import zarr.storage  # noqa: F401

from functa.storage.functaset.commit import commit
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.plan import Plan
from tests.helpers.storage import functasets as filled
from tests.helpers.storage.killed_writer import in_child

WRITERS, ROWS = 4, 60


def planned(path: Path) -> tuple[object, Plan]:
    place = filled.new_store(path)
    return place, filled.plan(place, n=ROWS, shard_rows=5, chunk_rows=5)


def write_all(path: Path, order: int | None) -> None:
    """Write every shard, in an order of this writer's own, and commit."""
    place, plan = planned(path)
    shards = list(range(plan.shards))
    if order is not None:
        random.Random(order).shuffle(shards)
    for shard in shards:
        bad = {2: "does not decode"} if shard == 3 else {}
        filled.write(place, plan, shard, bad=bad)  # type: ignore[arg-type]
    commit(place, [plan.id])  # type: ignore[arg-type]


def start(path: Path, order: int) -> int:
    child = os.fork()
    if child == 0:
        try:
            write_all(path, order)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def crowd(path: Path, luck: random.Random, kills: int) -> int:
    """Let the crowd write one store; return how many were killed first. Raises if a writer fails by itself."""
    dead, running = 0, {}
    for _ in range(WRITERS):
        running[start(path, luck.randrange(1 << 30))] = True
    while running:
        time.sleep(luck.uniform(0.002, 0.12))
        for child in list(running):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                del running[child]
                assert status == 0, "a writer failed by itself"
        if running and dead < kills and not list(path.glob("commits/*.json")):
            victim = luck.choice(list(running))
            os.kill(victim, signal.SIGKILL)
            _, status = os.waitpid(victim, 0)
            del running[victim]
            dead += os.WIFSIGNALED(status)
            running[start(path, luck.randrange(1 << 30))] = True
    return dead


def check(path: Path, reference: Path) -> None:
    assert filled.tree(path) == filled.tree(reference), "differs from an uninterrupted run"
    keys = Functaset.open(str(path)).load("train").keys
    assert len(keys) == len(set(keys)) == ROWS - 1


def main(folder: Path, kills: int, seed: int) -> int:
    luck = random.Random(seed)
    reference = folder / "reference"
    assert in_child(lambda: write_all(reference, None)) == 0
    dead, stores = 0, 0
    while dead < kills:
        path = folder / f"crowd-{stores}"
        dead += crowd(path, luck, 25)
        assert in_child(lambda path=path: check(path, reference)) == 0, f"store {stores}, seed {seed}"
        shutil.rmtree(path)
        stores += 1
    print(dead, "killed in", stores, "stores")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
