"""Start and watch several training processes on this machine with torchrun's agent.

The interface is that of one process: the job comes on standard input, rows leave on standard output, and the end of
standard input ends the run. The ranks get a pipe that only this process holds open (hold_ranks), so that they end with
it in any case.
"""

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from functa.tasks.dispatch.child import threads_of_a_run
from functa.tasks.training.ranks import STOPPED, STORE
from functa.tasks.training_jobs import TrainingJob

JOB = "FUNCTA_RANKS_JOB"  # environment variable: the job, as every rank receives it

GRACE_SECONDS = 25  # for ranks to save; less than the parent gives this process, which must end after them


def launch(job: TrainingJob, emit: Callable[[dict[str, Any]], None]) -> int:
    """Run job.devices ranks to their end; return the exit status. A rank that dies ends them all and is named."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    world = job.devices
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # a dead rank is reported in one line
    os.environ["OMP_NUM_THREADS"] = str(max(1, threads_of_a_run() // world))  # its ranks share them
    with tempfile.TemporaryDirectory(prefix="functa-ranks-") as folder:
        # Files instead of ports: torchrun's own stores would listen on all addresses of the machine.
        os.environ |= {JOB: job.model_dump_json(), STORE: str(Path(folder, "ranks"))}
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(GRACE_SECONDS)
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=world, max_restarts=0, monitor_interval=0.1, run_id="functa",
            rdzv_backend="c10d", rdzv_endpoint=str(Path(folder, "agent")), rdzv_configs={"store_type": "file"},
            local_addr="127.0.0.1", logs_specs=DefaultLogsSpecs(log_dir=folder),
        )  # fmt: skip
        try:
            elastic_launch(config, sys.executable)("-P", "-m", "functa.tasks.training")
        except ChildFailedError as error:
            emit({"error": _first_failure(error.failures, world), "may_pass": True})
            return 1
        except SignalException as error:
            return 128 + error.sigval
    return 0


def hold_ranks() -> int:
    """Replace standard input by a pipe whose other end only this process has; return that end. Closed, it ends them."""
    reading, writing = os.pipe()  # the writing end is not inherited
    os.dup2(reading, 0)
    return writing


def _first_failure(failures: Mapping[int, Any], world: int) -> str:
    """Describe how the rank ended that failed first; torchrun's agent ended the others by SIGTERM."""

    def blame(item: tuple[int, Any]) -> tuple[bool, bool]:
        code = item[1].exitcode
        return code in (-signal.SIGTERM, STOPPED), code > 0

    rank, failure = min(failures.items(), key=blame)
    code = failure.exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    return f"training process {rank + 1} of {world} {how}"
