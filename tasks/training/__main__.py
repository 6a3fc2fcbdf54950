"""The training process: reads one job as a JSON line, writes its progress as JSON lines.

Its standard input stays open as long as the parent lives: when it closes, the process ends, so that no orphan
goes on training after its parent was killed.
"""

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from storage.errors import TransientError

STOP_SECONDS = 30.0


class Notes(logging.Handler):
    """What our own rooms log (resumed at step ..., checkpoint skipped) reaches the run's log."""

    def __init__(self, emit: Callable[[dict[str, Any]], None]) -> None:
        super().__init__(logging.INFO)
        self._emit = emit

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.split(".")[0] in ("tasks", "storage", "models"):
            self._emit({"note": record.getMessage()})


def main() -> int:
    """Exit status 0 done, 1 failed (the last line says why), 143 stopped by SIGTERM after saving."""
    answers = os.fdopen(os.dup(1), "w")  # libraries that print to stdout must not garble the answers
    os.dup2(2, 1)

    def emit(row: dict[str, Any]) -> None:
        answers.write(json.dumps(row) + "\n")
        answers.flush()

    logging.basicConfig(level=logging.WARNING, handlers=[logging.StreamHandler(sys.stderr), Notes(emit)])
    for room in ("tasks", "storage", "models"):
        logging.getLogger(room).setLevel(logging.INFO)
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        emit({"done": _run(job, emit)})
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        emit({"error": text, "may_pass": isinstance(error, TransientError)})
        if os.environ.get("FUNCTA_DEBUG"):
            raise
        return 1
    return 0


def _run(job: dict[str, Any], emit: Any) -> dict[str, Any]:
    if job["kind"] == "meta_train":
        from tasks.training import meta_train

        return meta_train.run(meta_train.MetaTrainJob.model_validate(job), emit)
    if job["kind"] == "classifier":
        from tasks.training import classifier

        return classifier.run(classifier.ClassifierJob.model_validate(job), emit)
    if job["kind"] == "diffusion":
        from tasks.training import diffusion

        return diffusion.run(diffusion.DiffusionJob.model_validate(job), emit)
    from tasks.training import pixel_classifier

    return pixel_classifier.run(pixel_classifier.PixelClassifierJob.model_validate(job), emit)


def _end_with_parent() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)  # the loop saves at the end of its step
    time.sleep(STOP_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
