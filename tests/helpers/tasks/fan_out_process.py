"""Units of work that are played, for fan_out: here, on Dask workers, and in processes that are killed."""

import os
import sys
import time
from pathlib import Path
from typing import Any

from functa.tasks.config import DispatchConfig
from functa.tasks.dispatch.child import GivenUp
from functa.tasks.dispatch.fan_out import fan_out, given_up
from functa.tasks.units import retried, unit


@unit("play", "play {number}")
def play(number: int, folder: str, seconds: float = 0.0, fault: str = "") -> dict[str, Any]:
    """Leaves a file, waits for so long, fails where it is to; tells where it ran."""
    begun = time.time()
    Path(folder, f"{number}-begun-{os.getpid()}").touch()
    while time.time() - begun < seconds:
        if given_up():
            Path(folder, f"{number}-given-up").touch()
            raise GivenUp("played for nobody")
        time.sleep(0.05)
    if fault:
        raise ValueError(fault)
    import torch

    told = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PREFECT_API_URL")}
    return told | {
        "number": number, "pid": os.getpid(), "begun": begun, "ended": time.time(), "threads": torch.get_num_threads(),
    }  # fmt: skip


def all_of(each: list[dict[str, Any]], **dispatch: Any) -> list[Any]:
    """Plays them."""
    config = DispatchConfig(retry_delay=0.0, **dispatch)
    return fan_out(retried(play, config), each, config)


def pids(folder: Path, number: int) -> list[int]:
    """Of the processes in which this one was begun."""
    return [int(path.name.rpartition("-")[2]) for path in folder.glob(f"{number}-begun-*")]


if __name__ == "__main__":
    runner, folder = sys.argv[1:]
    all_of([{"number": n, "folder": folder, "seconds": 600} for n in range(2)], runner=runner, workers=2)
