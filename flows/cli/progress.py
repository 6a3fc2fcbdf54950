"""Progress lines on standard error, and log output without tracebacks."""

import copy
import logging
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console

from functa.tasks.dispatch.progress import time_left

if TYPE_CHECKING:
    pass


def quiet_tracebacks() -> None:
    """Prefect prints a failed run's traceback at every level; a person is given one line, unless --debug asks.

    The run's page in the UI keeps them.
    """
    import prefect.main  # noqa: F401  sets up Prefect's logging

    if os.environ.get("FUNCTA_DEBUG"):
        return
    loggers = [logging.getLogger(name) for name in ("", "prefect", "prefect.flow_runs", "prefect.task_runs")]
    for handler in {handler for logger in loggers for handler in logger.handlers}:
        if handler.formatter is not None and "Console" in type(handler).__name__:
            handler.formatter.format = _without_traceback(handler.formatter.format)  # type: ignore[method-assign]


def _without_traceback(render: Callable[[logging.LogRecord], str]) -> Callable[[logging.LogRecord], str]:
    """Of a copy: the handler that sends records to the server has left the traceback's text in the record."""

    def told(record: logging.LogRecord) -> str:
        bare = copy.copy(record)
        bare.exc_info = bare.exc_text = None
        return render(bare)

    return told


def image_progress(word: str) -> Callable[[int, int], None]:
    """Tells on standard error, at most every second, of images done, rate and time left: call(done, total)."""
    console = Console(stderr=True, highlight=False)
    begun = told = time.monotonic()
    already: int | None = None

    def tell(done: int, total: int) -> None:
        nonlocal begun, told, already
        now = time.monotonic()
        if already is None:  # whatever was loaded and compiled before is no part of the rate
            already, begun = done, now
        if now - told < 1 or done <= already:
            return
        told, rate = now, (done - already) / (now - begun)
        left = time_left(done, total, rate)
        console.print(f"{word}: {done} of {total} images, {rate:.3g} images/s, {left}", soft_wrap=True)

    return tell


def shard_progress(word: str) -> Callable[[int, int, int], None]:
    """Tells on standard error, at most every second, of shards done, MB/s and time left: call(done, total, bytes)."""
    console = Console(stderr=True, highlight=False)
    begun = told = time.monotonic()
    already: int | None = None

    def tell(done: int, total: int, written: int) -> None:
        nonlocal told, already
        already = done if already is None else already
        now = time.monotonic()
        if done == total or now - told < 1 or not written:
            return
        told = now
        left = (now - begun) / (done - already) * (total - done)
        rate = written / 1e6 / (now - begun)
        console.print(f"{word}: {done} of {total} shards, {rate:.0f} MB/s, about {left:.0f} s left", soft_wrap=True)

    return tell
