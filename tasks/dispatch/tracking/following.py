"""Start a tracker's process beside a training, and end it after it."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO

from functa.storage.errors import printable
from functa.tasks.dispatch.child import PROJECT
from functa.tasks.dispatch.tracking.job import TrackingJob

COMMAND = [sys.executable, "-P", "-m", "functa.tasks.dispatch.tracking"]

FINISH_SECONDS = 60.0  # for what is left to be sent


@contextmanager
def tracked(job: TrackingJob | None, warn: Callable[[str], None]) -> Iterator[None]:
    """Within, a tracker shows the curve of a training; None: no tracker.

    The training's own error, or none, leaves the block: of what becomes of the tracker, a warning is all.
    """
    if job is None:
        yield
        return
    with tempfile.TemporaryFile("w+") as errors:
        child = _started(job, errors, warn)
        try:
            yield
        finally:
            if child is not None:
                _end(child, job, errors, warn)


def _started(job: TrackingJob, errors: IO[str], warn: Callable[[str], None]) -> "subprocess.Popen[str] | None":
    paths = os.pathsep.join([str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        child = subprocess.Popen(
            COMMAND, env=os.environ | {"PYTHONPATH": paths}, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=errors, text=True, start_new_session=True,
        )  # fmt: skip
        assert child.stdin
        with suppress(BrokenPipeError):  # it died at once; its end reports how
            child.stdin.write(job.model_dump_json() + "\n")
            child.stdin.flush()
    except OSError as error:
        warn(_warning(job, f"could not be started ({error.strerror})"))
        return None
    return child


def _end(child: "subprocess.Popen[str]", job: TrackingJob, errors: IO[str], warn: Callable[[str], None]) -> None:
    assert child.stdin
    with suppress(BrokenPipeError):
        child.stdin.close()
    try:
        status = child.wait(FINISH_SECONDS)
    except BaseException as error:
        child.kill()
        child.wait()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise  # Ctrl-C
        warn(_warning(job, f"did not end within {FINISH_SECONDS:.0f} s and was stopped"))
        return
    if status:
        errors.seek(0)
        lines = errors.read().strip().splitlines()
        warn(_warning(job, printable(lines[-1]) if lines else f"ended with status {status}"))


def _warning(job: TrackingJob, what: str) -> str:
    return f"tracking={job.kind}: {what}; the training is not affected, and its curve is in {job.output}/metrics.jsonl"
