"""A run whose worker was killed goes on: what it writes is worth more than a pipe that nobody reads."""

import logging
import os
from collections.abc import Iterator
from typing import Any


def outlive_the_worker() -> None:
    """From now on a log line that cannot be written does not end this process; the server has its logs anyway.

    Workers read their runs' output through a pipe. Once its reader is gone, rich, with which Prefect writes its lines,
    exits at the next one.
    """
    for console in _consoles():
        console.on_broken_pipe = _write_to_nobody


def _consoles() -> Iterator[Any]:
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", []):
            if (console := getattr(handler, "console", None)) is not None:
                yield console


def _write_to_nobody() -> None:
    nobody = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nobody, stream)
    os.close(nobody)
