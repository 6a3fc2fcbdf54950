"""The training process: reads one job as a JSON line, writes its progress as JSON lines.

Its standard input stays open as long as the parent lives: when it closes, the process ends, so that no orphan
goes on training after its parent was killed. A job for several devices is launched as so many ranks, each of which
runs this module again.
"""

import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from importlib import import_module
from itertools import accumulate
from typing import Any, NoReturn

from functa.storage.errors import TransientError, one_line
from functa.tasks.training.launch import JOB, launch
from functa.tasks.training.ranks import RankLost, leave_ranks
from functa.tasks.training.run import NonFiniteLoss
from functa.tasks.training_jobs import JOBS, TrainingJob

PACKAGE = "functa"

STOP_SECONDS = 30.0

LAUNCHER_SECONDS = 30.0  # to notice a dead rank: at once, but on a busy machine it took more than 5

TEXT_BYTES = 3000  # of a row, which is one write of less than a pipe's 4096 bytes and so cannot mix with another rank's


class Notes(logging.Handler):
    """Forwards what this package logs (resumed at step ..., checkpoint skipped) to the run's log."""

    def __init__(self, emit: Callable[[dict[str, Any]], None]) -> None:
        super().__init__(logging.INFO)
        self._emit = emit

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith(PACKAGE):
            self._emit({"note": record.getMessage()})


def main() -> int:
    """Exit status 0 done, 1 failed (the last line says why), 143 stopped by SIGTERM after saving."""
    answers = os.fdopen(os.dup(1), "w")

    def emit(row: dict[str, Any]) -> None:
        answers.write(line(row))  # one write a row: ranks share the pipe
        answers.flush()

    as_rank = JOB in os.environ
    job = JOBS.validate_json(os.environ[JOB] if as_rank else sys.stdin.readline())
    parent = os.dup(0)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if job.devices > 1 and not as_rank:
        return launch(job, emit)
    os.dup2(2, 1)  # libraries that print to stdout must not garble the answers
    return _train(job, emit, speaks=os.environ.get("RANK", "0") == "0")


def line(row: dict[str, Any]) -> str:
    """A row as a line of JSON, its texts cut to what one write may hold."""
    return json.dumps({key: cut(value) if isinstance(value, str) else value for key, value in row.items()}) + "\n"


def cut(text: str) -> str:
    """As much of a text as takes TEXT_BYTES in JSON, where one character may take 12."""
    ends = accumulate(len(json.dumps(character)) - 2 for character in text[:TEXT_BYTES])
    return text[: sum(end <= TEXT_BYTES for end in ends)]


def _train(job: TrainingJob, emit: Callable[[dict[str, Any]], None], speaks: bool) -> int:
    """Does the job in this process. Rows and figures are the first rank's to tell; a fault is anybody's."""
    tell = emit if speaks else lambda row: None
    logging.basicConfig(level=logging.WARNING, handlers=[logging.StreamHandler(sys.stderr), Notes(tell)])
    logging.getLogger(PACKAGE).setLevel(logging.INFO)
    try:
        tell({"done": _run(job, tell)})
    except Exception as error:
        if isinstance(error, RankLost):
            time.sleep(LAUNCHER_SECONDS)  # if a rank died, the launcher now ends this one and tells how that one ended
        text = told(job, error)
        may_pass = isinstance(error, TransientError | RankLost)
        emit({"error": text, "may_pass": may_pass, "by_config": isinstance(error, NonFiniteLoss)})
        if os.environ.get("FUNCTA_DEBUG"):
            raise
        return 1
    leave_ranks()
    return 0


def told(job: TrainingJob, error: Exception) -> str:
    """The error in one line; of a memory that is full, also which keys make the step smaller."""
    text = one_line(error)
    if type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in text:
        return text
    kind, batch = job.kind, job.training.batch
    if kind == "pixel_classifier":
        mend = f"evaluation.pixel_classifier.batch (now {batch})"
    else:
        now = getattr(job.training, "micro_batch", None) or f"empty: the whole batch of {batch}"
        other = "inner.checkpoint=true" if kind == "meta_train" else f"{kind}.precision=bf16"
        mend = f"{kind}.micro_batch (now {now}), or set {other}"
    asked = re.search(r"ried to allocate ([\d.]+ \w+)", text)
    amount = f" ({asked[1]} more were asked for)" if asked else ""
    return f"{kind}: out of memory{amount}: lower {mend}; what is saved is kept"


def _run(job: TrainingJob, emit: Any) -> dict[str, Any]:
    """Run the function of the job's kind; each loads only what it needs."""
    module = import_module(f"functa.tasks.training.{job.kind}")
    figures: dict[str, Any] = module.run(job, emit)
    return figures


def _end_with(parent: int) -> None:
    """Ends this process when the descriptor does: whoever holds the other end has gone."""
    while os.read(parent, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)  # the loop saves at the end of its step
    time.sleep(STOP_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def _leave(status: int) -> NoReturn:
    """Ends at once: all is written, and threads of other ranks' connections can abort an interpreter that winds up."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    try:
        status = main()
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    if JOB in os.environ:  # a rank
        _leave(status)
    sys.exit(status)
