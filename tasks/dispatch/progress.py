"""How long work speaks: log lines with rate and time left, and a progress artifact, both throttled."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from functa.storage.errors import one_line

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


class Lines:
    """Lines in the run's log, at most one every few seconds; the last one always."""

    def __init__(self) -> None:
        from prefect import get_run_logger

        self._log = get_run_logger()
        self._logged = 0.0

    def show(self, done: int, total: int, line: str) -> None:
        """A line, or none so soon after another."""
        now = time.monotonic()
        if done >= total or now - self._logged >= LOG_SECONDS:
            self._log.info(line)
            self._logged = now

    def note(self, line: str) -> None:
        """A line of its own."""
        self._log.info(line)


class Progress(Lines):
    """Publishes (done, total) as a Prefect progress artifact too, as far as the server answers: work goes on anyway."""

    def __init__(self, key: str, description: str) -> None:
        super().__init__()
        self._named = {"key": key, "description": description}
        self._artifact: Any = None
        self._published = 0.0
        self._publish(0.0)

    def show(self, done: int, total: int, line: str) -> None:
        """A log line and the artifact, each at most every few seconds; the last one always."""
        super().show(done, total, line)
        if done >= total or time.monotonic() - self._published >= ARTIFACT_SECONDS:
            self._publish(min(100.0, 100.0 * done / max(1, total)))

    def _publish(self, percent: float) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        with as_far_as_heard("progress"):
            if self._artifact is None:
                self._artifact = create_progress_artifact(percent, **self._named)
            else:
                update_progress_artifact(self._artifact, percent)
        self._published = time.monotonic()


@contextmanager
def as_far_as_heard(what: str) -> Iterator[None]:
    """Around what is only told to the server: one that does not answer is a warning in the log, and no failure."""
    import httpx
    from prefect import get_run_logger

    try:
        yield
    except httpx.HTTPError as error:
        get_run_logger().warning(f"{what} could not be published: {one_line(error)}")
