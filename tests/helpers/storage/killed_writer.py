"""Kill a real writer with SIGKILL before its k-th durable step, for every k, and let another one finish its work.

Run as a process of its own: it forks the writers, so zarr's event loop must not run here yet.
Prints the number of steps: python -m tests.helpers.storage.killed_writer WHAT FOLDER
"""

import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy  # noqa: F401  imported before the forks, for speed
import zarr.codecs
import zarr.storage  # noqa: F401

from functa.storage.functaset.commit import commit
from functa.storage.functaset.functaset import Functaset
from functa.storage.places.address import open_location
from functa.storage.runs.checkpoints import load_checkpoint, save_checkpoint
from tests.helpers.storage import functasets as filled

STEPS = ("fsync", "link", "replace", "unlink")  # of os: everything that a write to disk is made of


def kill_before(k: int) -> None:
    count = 0

    def counting(act: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == k:
                os.kill(os.getpid(), signal.SIGKILL)
            return act(*args, **kwargs)

        return counted

    for name in STEPS:
        setattr(os, name, counting(getattr(os, name)))


def in_child(work: Callable[[], None]) -> int:
    """Return the wait status of a forked process that did the work."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def write_store(path: Path) -> None:
    location = filled.new_store(path)
    plan = filled.plan(location, n=6, shard_rows=3, chunk_rows=3)
    for shard in range(plan.shards):
        filled.write(location, plan, shard, bad={1: "does not decode"} if shard == 0 else {})
    commit(location, [plan.id])


def check_store(path: Path, reference: Path) -> None:
    assert filled.tree(path) == filled.tree(reference), "differs from an uninterrupted run"
    assert len(Functaset.open(str(path)).load("train")) == 5


def check_killed_store(path: Path) -> None:
    """Check that nothing is visible, or all of it."""
    if list(path.glob("commits/*.json")):
        assert len(Functaset.open(str(path)).load("train")) == 5


def write_checkpoints(path: Path) -> None:
    newest = load_checkpoint(open_location(str(path)))
    for step in range(newest.step + 1 if newest else 1, 4):
        save_checkpoint(open_location(str(path)), step, {"w": np.full(5, step)}, {"step": step})


def check_killed_checkpoints(path: Path) -> None:
    """Check that the loaded checkpoint is whole and as new as the newest marker."""
    found = load_checkpoint(open_location(str(path)))
    markers = sorted(path.glob("*.json"))
    assert (found is None) == (not markers)
    if found:
        assert f"step-{found.step:08d}.json" == markers[-1].name
        assert (found.tensors["w"] == found.step).all()
        assert found.metadata == {"step": found.step}


def check_checkpoints(path: Path, reference: Path) -> None:
    """Check that all objects exist; a kill may leave some old ones for the next checkpoint to prune."""
    assert filled.tree(path).items() >= filled.tree(reference).items()


WORK = {
    "store": (write_store, check_killed_store, check_store),
    "checkpoint": (write_checkpoints, check_killed_checkpoints, check_checkpoints),
}


def main(what: str, folder: Path, every: int) -> int:
    write, check_killed, check = WORK[what]
    reference = folder / "reference"
    assert in_child(lambda: write(reference)) == 0
    k, kills = 1, 0
    while True:
        path = folder / f"killed-{k}"

        def doomed(k: int = k, path: Path = path) -> None:
            kill_before(k)
            write(path)

        status = in_child(doomed)
        if status == 0:
            print(kills, "kills")
            return 0

        def finish(path: Path = path) -> None:
            check_killed(path)
            write(path)
            check(path, reference)

        assert os.WTERMSIG(status) == signal.SIGKILL, f"point {k}: failed by itself"
        assert in_child(finish) == 0, f"point {k}: the next writer failed"
        shutil.rmtree(path)
        k, kills = k + every, kills + 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 1))
