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
from typing import Any

STOP_SECONDS = 30.0


def main() -> int:
    """Exit status 0 done, 1 failed (the last line says why), 143 stopped by SIGTERM after saving."""
    answers = os.fdopen(os.dup(1), "w")  # libraries that print to stdout must not garble the answers
    os.dup2(2, 1)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)

    def emit(row: dict[str, Any]) -> None:
        answers.write(json.dumps(row) + "\n")
        answers.flush()

    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        emit({"done": _run(job, emit)})
    except Exception as error:
        logging.getLogger(__name__).debug("failed", exc_info=True)
        emit({"error": f"{' '.join(str(error).split()) or type(error).__name__}", "type": type(error).__name__})
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
