"""Units of work that only wait, for tests of fan_out: here, on Dask workers, and in processes that are killed."""

import os
import sys
import time
from pathlib import Path
from typing import Any

from functa.tasks.config import DispatchConfig
from functa.tasks.dispatch.child import RunEnded
from functa.tasks.dispatch.fan_out import fan_out, run_ended
from functa.tasks.prefect_tasks import retried, unit


@unit("pretend", "pretend {number}")
def pretend(number: int, folder: str, seconds: float = 0.0, fault: str = "") -> dict[str, Any]:
    """Leave a file, wait, fail with `fault` if there is one; return where it ran."""
    begun = time.time()
    Path(folder, f"{number}-begun-{os.getpid()}").touch()
    while time.time() - begun < seconds:
        if run_ended():
            Path(folder, f"{number}-run-ended").touch()
            raise RunEnded("its run has ended")
        time.sleep(0.05)
    if fault:
        raise ValueError(fault)
    import torch

    environment = {
        name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PREFECT_API_URL")
    }
    return environment | {
        "number": number, "pid": os.getpid(), "begun": begun, "ended": time.time(), "threads": torch.get_num_threads(),
    }  # fmt: skip


def all_of(each: list[dict[str, Any]], **dispatch: Any) -> list[Any]:
    """Run a unit for each of the parameters."""
    config = DispatchConfig(retry_delay=0.0, **dispatch)
    return fan_out(retried(pretend, config), each, config)


def pids(folder: Path, number: int) -> list[int]:
    """Return the ids of the processes that began this unit."""
    return [int(path.name.rpartition("-")[2]) for path in folder.glob(f"{number}-begun-*")]


if __name__ == "__main__":
    runner, folder = sys.argv[1:]
    all_of([{"number": n, "folder": folder, "seconds": 600} for n in range(2)], runner=runner, workers=2)
