"""Progress of long work: log lines with rate and time left, and a progress artifact, both throttled."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from functa.storage.errors import one_line

LOG_SECONDS = 5.0

ARTIFACT_SECONDS = 5.0


class Pace:
    """Measures a rate and the time left, leaving out the first step, which includes start-up and compiling."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def per_second(self, done: int) -> float:
        """Return units per second since the first call; 0 while there is no rate. Call it after every step."""
        now = time.monotonic()
        if self._first is None:
            self._first = done, now
        first, begun = self._first
        return (done - first) / (now - begun) if done > first and now > begun else 0.0

    def left(self, done: int, total: int) -> str:
        """Return `, m:ss left` to end a line with; empty while there is no rate, and at the end."""
        rate = self.per_second(done)
        return f", {time_left(done, total, rate)}" if rate and done < total else ""


def images_per_second(rate: float) -> str:
    """Return the rate with its unit; slow rates keep two digits."""
    return f"{rate:.0f} images/s" if rate >= 10 else f"{rate:.2g} images/s"


def count(number: int, noun: str) -> str:
    """Return `1 image` or `2 images`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def time_left(done: int, total: int, per_second: float) -> str:
    """Return `m:ss left`, or an empty string while there is no rate."""
    if per_second <= 0:
        return ""
    seconds = round((total - done) / per_second)
    return f"{seconds // 60}:{seconds % 60:02d} left"


def describe_row(row: dict[str, Any], left: str = "") -> str:
    """Return one line for a row of a training's curve: step, figures, rate, and `left` as Pace.left returns it.

    The row of a process's first step has no rate.
    """
    figures = [f"loss {row['loss']:.4g}"]
    figures += [f"training PSNR {row['psnr_train']:.2f} dB"] if "psnr_train" in row else []
    figures += [f"validation PSNR {row['psnr']:.2f} dB"] if "psnr" in row else []
    figures += [f"accuracy {row['accuracy']:.3f}"] if "accuracy" in row else []
    figures += [images_per_second(row["images_per_s"])] if "images_per_s" in row else []
    return ", ".join([f"step {row['step']}/{row['steps']}", *figures]) + left


class Lines:
    """Writes lines to the run's log, at most one every few seconds; the last one always, but no line twice in a row."""

    def __init__(self) -> None:
        from prefect import get_run_logger

        self._log = get_run_logger()
        self._logged, self._last = 0.0, ""

    def show(self, done: int, total: int, line: str) -> None:
        """Log a line, unless another was logged a moment ago."""
        now = time.monotonic()
        if line != self._last and (done >= total or now - self._logged >= LOG_SECONDS):
            self._log.info(line)
            self._logged, self._last = now, line

    def note(self, line: str) -> None:
        """Log a line in any case."""
        self._log.info(line)


class Progress(Lines):
    """Publishes (done, total) as a Prefect progress artifact too; work continues if the server does not answer."""

    def __init__(self, key: str, description: str) -> None:
        super().__init__()
        self._named = {"key": key, "description": description}
        self._artifact: Any = None
        self._published = 0.0
        self._publish(0.0)

    def show(self, done: int, total: int, line: str) -> None:
        """Log a line and update the artifact, each at most every few seconds; the last time always."""
        super().show(done, total, line)
        if done >= total or time.monotonic() - self._published >= ARTIFACT_SECONDS:
            self._publish(min(100.0, 100.0 * done / max(1, total)))

    def _publish(self, percent: float) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        with warn_if_unreachable("progress"):
            if self._artifact is None:
                self._artifact = create_progress_artifact(percent, **self._named)
            else:
                update_progress_artifact(self._artifact, percent)
        self._published = time.monotonic()


@contextmanager
def warn_if_unreachable(what: str) -> Iterator[None]:
    """Log a warning if the server does not answer: for messages that the work does not need."""
    import httpx
    from prefect import get_run_logger

    try:
        yield
    except httpx.HTTPError as error:
        get_run_logger().warning(f"{what} could not be published: {one_line(error)}")
