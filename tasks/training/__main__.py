"""The training process: reads one job as a JSON line, writes its progress as JSON lines.

Its standard input stays open as long as the parent lives: when it closes, the process ends at once and saves nothing.
Its parent was killed, and a process that was stopped meanwhile and wakes late must not write over what another one has
made since. A job for several devices is launched as as many ranks, each of which runs this module again.
"""

import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from importlib import import_module
from itertools import accumulate
from typing import Any, NoReturn

from functa.storage.errors import TransientError, one_line
from functa.tasks.training.launch import JOB, hold_ranks, launch
from functa.tasks.training.learner import NonFiniteLoss
from functa.tasks.training.ranks import STOPPED, RankLost, leave_ranks
from functa.tasks.training_jobs import JOBS, TrainingJob

PACKAGE = "functa"

LAUNCHER_SECONDS = 30.0  # for the launcher to notice a dead rank; on a busy machine it took more than 5

TEXT_BYTES = (
    3000  # of a text: a row of less than a pipe's 4096 bytes is one write, which cannot mix with another rank's
)


class Notes(logging.Handler):
    """Forwards what this package logs (resumed at step ..., checkpoint skipped) to the run's log."""

    def __init__(self, emit: Callable[[dict[str, Any]], None]) -> None:
        super().__init__(logging.INFO)
        self._emit = emit

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith(PACKAGE):
            self._emit({"note": record.getMessage()})


def main() -> int:
    """Return the exit status: 0 done, 1 failed (the last row has the error), 143 stopped by SIGTERM after saving."""
    answers = os.fdopen(os.dup(1), "w")

    def emit(row: dict[str, Any]) -> None:
        answers.write(line(row))  # one write per row: ranks share the pipe
        answers.flush()

    as_rank = JOB in os.environ
    job = JOBS.validate_json(os.environ[JOB] if as_rank else sys.stdin.readline())
    parent = os.dup(0)
    if job.devices > 1 and not as_rank:
        ranks = hold_ranks()
        _when_closed(parent, lambda: os.close(ranks))
        return launch(job, emit)
    _when_closed(parent, lambda: os._exit(STOPPED))
    os.dup2(2, 1)  # libraries that print to stdout must not corrupt the rows
    return _train(job, emit, first=os.environ.get("RANK", "0") == "0")


def line(row: dict[str, Any]) -> str:
    """Return a row as a line of JSON, its texts cut so that it fits into one write."""
    return json.dumps({key: cut(value) if isinstance(value, str) else value for key, value in row.items()}) + "\n"


def cut(text: str) -> str:
    """Return as much of a text as fits into TEXT_BYTES of JSON, where one character may take 12."""
    ends = accumulate(len(json.dumps(character)) - 2 for character in text[:TEXT_BYTES])
    return text[: sum(end <= TEXT_BYTES for end in ends)]


def _train(job: TrainingJob, emit: Callable[[dict[str, Any]], None], first: bool) -> int:
    """Do the job in this process. Only the first rank sends rows and figures; every rank sends its error."""
    report = emit if first else lambda row: None
    logging.basicConfig(level=logging.WARNING, handlers=[logging.StreamHandler(sys.stderr), Notes(report)])
    logging.getLogger(PACKAGE).setLevel(logging.INFO)
    try:
        report({"done": _run(job, report)})
    except Exception as error:
        if isinstance(error, RankLost) and job.devices > 1:
            time.sleep(LAUNCHER_SECONDS)  # if a rank died, the launcher ends this one now and reports the dead one
        text = error_line(job, error)
        may_pass = isinstance(error, TransientError | RankLost)
        emit({"error": text, "may_pass": may_pass, "by_config": isinstance(error, NonFiniteLoss)})
        if os.environ.get("FUNCTA_DEBUG"):
            raise
        return 1
    leave_ranks()
    return 0


def error_line(job: TrainingJob, error: Exception) -> str:
    """Return the error in one line; if memory is full, with the settings that make the step smaller."""
    text = one_line(error)
    if isinstance(error, RankLost) and job.nodes > 1:
        return (
            f"node {job.node} of {job.nodes}: {text}: another machine has ended; start the training on all of them "
            f"again, which continues at the newest checkpoint"
        )
    if type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in text:
        return text
    kind, batch = job.kind, job.training.batch
    if kind == "pixel_classifier":
        fix = f"evaluation.pixel_classifier.batch (now {batch})"
    else:
        now = getattr(job.training, "micro_batch", None) or f"null: the whole batch of {batch}"
        other = "inner.checkpoint=true" if kind == "meta_train" else f"{kind}.precision=bf16"
        fix = f"{kind}.micro_batch (now {now}), or set {other}"
    asked = re.search(r"ried to allocate ([\d.]+ \w+)", text)
    amount = f" ({asked[1]} more were asked for)" if asked else ""
    return f"{kind}: out of memory{amount}: lower {fix}; saved steps are kept"


def _run(job: TrainingJob, emit: Any) -> dict[str, Any]:
    """Run the function of the job's kind; each loads only what it needs."""
    module = import_module(f"functa.tasks.training.{job.kind}")
    figures: dict[str, Any] = module.run(job, emit)
    return figures


def _when_closed(parent: int, end: Callable[[], None]) -> None:
    """Call `end` in a thread when the descriptor closes, since the parent has ended."""

    def watch() -> None:
        while os.read(parent, 1024):
            pass
        end()

    threading.Thread(target=watch, daemon=True).start()


def _leave(status: int) -> NoReturn:
    """Exit at once: everything is written, and threads of connections to other ranks can abort a normal shutdown."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    try:
        status = main()
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    if JOB in os.environ or ("functa.tasks.training.meeting" in sys.modules and status):
        _leave(status)  # a rank
    sys.exit(status)
