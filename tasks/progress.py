"""How long work speaks: log lines with rate and time left, and a progress artifact, both throttled."""

import time
from typing import Any

LOG_SECONDS = 5.0
ARTIFACT_SECONDS = 5.0


def time_left(done: int, total: int, per_second: float) -> str:
    """`m:ss left`, or an empty string before there is a rate."""
    if per_second <= 0:
        return ""
    seconds = round((total - done) / per_second)
    return f"{seconds // 60}:{seconds % 60:02d} left"


def describe_row(row: dict[str, Any], batch: int) -> str:
    """One line of a training row: step, figures, rate, time left."""
    figures = [f"loss {row['loss']:.4g}"]
    figures += [f"training PSNR {row['psnr_train']:.2f} dB"] if "psnr_train" in row else []
    figures += [f"PSNR {row['psnr']:.2f} dB"] if "psnr" in row else []
    figures += [f"accuracy {row['accuracy']:.3f}"] if "accuracy" in row else []
    speed = row["images_per_s"]
    left = time_left(row["step"], row["steps"], speed / batch)
    return ", ".join([f"step {row['step']}/{row['steps']}", *figures, f"{speed:.0f} images/s", left]).rstrip(", ")


class Progress:
    """Publishes (done, total) as a Prefect progress artifact and lines in the run's log."""

    def __init__(self, key: str, description: str) -> None:
        from prefect import get_run_logger
        from prefect.artifacts import create_progress_artifact

        self._log = get_run_logger()
        self._artifact: Any = create_progress_artifact(0.0, key=key, description=description)
        self._logged = self._published = 0.0

    def show(self, done: int, total: int, line: str) -> None:
        """A log line and the artifact, each at most every few seconds; the last one always."""
        now, last = time.monotonic(), done >= total
        if last or now - self._logged >= LOG_SECONDS:
            self._log.info(line)
            self._logged = now
        if last or now - self._published >= ARTIFACT_SECONDS:
            from prefect.artifacts import update_progress_artifact

            update_progress_artifact(self._artifact, 100.0 * done / max(1, total))
            self._published = now

    def note(self, line: str) -> None:
        """A line of its own."""
        self._log.info(line)
