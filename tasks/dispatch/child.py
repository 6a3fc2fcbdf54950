"""Run training in a child process that ends with this one."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import functa

if TYPE_CHECKING:
    from functa.tasks.training_jobs import TrainingJob

from functa.storage.errors import FunctaError

# Threads that wait for each other spin half a millisecond and then sleep. By default they spin for some 10, which makes
# training several times slower on a machine that has other work too; sleeping at once costs up to 20 % on a quiet one.
# It must be set before torch is loaded.
SPIN = {"GOMP_SPINCOUNT": "10000"}

_children: set["subprocess.Popen[str]"] = set()

_stopping = threading.Event()

PROJECT = Path(functa.__file__).parents[1]  # where the package is imported from

STOP_SECONDS = 30.0


class DispatchError(FunctaError):
    """Workers are not available or were lost; one line. The work itself is not at fault."""


class RunEnded(Exception):
    """A unit of work stopped early, since the run that requested it has ended."""


class TrainingFailed(FunctaError):
    """A training process failed; the message is its last error, or how it ended."""

    def __init__(self, message: str, may_pass: bool, by_config: bool = False) -> None:
        super().__init__(message)
        self.may_pass = may_pass  # it was killed, so another try may succeed; bad input or NaN would fail again
        self.by_config = by_config  # only another config would help: the loss diverged

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (str(self), self.may_pass, self.by_config))


def train_in_child(
    job: "TrainingJob", on_row: Callable[[dict[str, Any]], None], threads: int | None = None
) -> dict[str, Any]:
    """Run one training job in a process of its own and return its figures.

    torch's global generator, threads and compiler state belong to the child. Whatever ends this call early
    (cancellation, Ctrl-C) stops the child: first SIGTERM, on which it saves, then SIGKILL. A job for several devices
    has ranks as processes of the child, which watches them; this process sees no difference.
    Raises TrainingFailed.
    """
    if _stopping.is_set():
        raise TrainingFailed(f"the {job.kind} process was not started: the run is being stopped", may_pass=False)
    # The user's folder stays the current one: relative locations mean the same in the child.
    paths = [str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = SPIN | os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    if threads:
        environment |= {"OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "functa.tasks.training"],  # -P: the user's folder is not searched for modules
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            text=True, start_new_session=True,
        )  # fmt: skip
        _children.add(child)
        try:
            if _stopping.is_set():  # it was set after the check above
                _signal(child, signal.SIGTERM)
            return _exchange(child, job, on_row, errors)
        finally:
            _stop(child)
            _children.discard(child)


def _exchange(
    child: subprocess.Popen[str], job: "TrainingJob", on_row: Callable[[dict[str, Any]], None], errors: IO[str]
) -> dict[str, Any]:
    assert child.stdin and child.stdout
    try:
        child.stdin.write(job.model_dump_json() + "\n")
        child.stdin.flush()
    except BrokenPipeError:
        pass  # the child died at once; the error below reports how
    for line in child.stdout:
        answer = json.loads(line)
        if "error" in answer:
            if os.environ.get("FUNCTA_DEBUG"):
                child.wait(STOP_SECONDS)
                print(_tail(errors, 20_000), file=sys.stderr)  # noqa: T201  --debug asks for the traceback
            raise TrainingFailed(answer["error"], answer["may_pass"], answer.get("by_config", False))
        if "done" in answer:
            return dict(answer["done"])
        on_row(answer)
    status = child.wait()
    tail = _tail(errors)
    if _stopping.is_set():
        raise TrainingFailed(f"the {job.kind} process was stopped with the run", may_pass=False)
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    raise TrainingFailed(
        f"the {job.kind} process {how}" + (f": {tail.splitlines()[-1]}" if tail else ""), may_pass=True
    )


def _tail(errors: IO[str], length: int = 2000) -> str:
    errors.seek(0)
    return errors.read()[-length:].strip()


def _stop(child: subprocess.Popen[str]) -> None:
    if child.poll() is None:
        _signal(child, signal.SIGTERM)
        try:
            child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            _signal(child, signal.SIGKILL)
            child.wait()
    for stream in (child.stdin, child.stdout):
        if stream:
            stream.close()


def _signal(child: "subprocess.Popen[str]", number: int) -> None:
    """Send a signal to the child and its processes, unless it has just ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)


def threads_of_a_run() -> int:
    """Return how many threads torch uses by default: OMP_NUM_THREADS, else every core that this process may use.

    Computed without loading torch.
    """
    requested = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if requested.isdecimal() and int(requested):
        return int(requested)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def stop_children() -> None:
    """End every training process of this one, for a flow that is interrupted while others wait in threads."""
    _stopping.set()  # a retry must not start what was just stopped
    for child in list(_children):
        if child.poll() is None:
            _signal(child, signal.SIGTERM)


def allow_children() -> None:
    """Allow training again after stop_children, for a new flow."""
    _stopping.clear()
