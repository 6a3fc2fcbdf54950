"""A Dask cluster as an operator starts it: a scheduler and workers, each a process of its own, on loopback."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tests.helpers.flows.prefect_server import free_port

PROJECT = Path(__file__).parents[3]


@contextmanager
def scheduler() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Start a scheduler; yield its address and its process."""
    port = free_port()
    with _running("scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard") as process:
        _await_line(process, "Scheduler at")
        yield f"tcp://127.0.0.1:{port}", process


@contextmanager
def worker(address: str, *options: str, before: str = "", **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Start a worker and wait until it has connected; `before` is Python code that it runs first."""
    plain = ("--nthreads", "1", "--no-nanny", "--no-dashboard")
    with _running("worker", address, *plain, *options, before=before, environment=environment) as process:
        _await_line(process, "Registered to")
        yield process


@contextmanager
def _running(
    part: str, *options: str, before: str = "", environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    code = f"{before}\nfrom distributed.cli.dask_{part} import main\nmain()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *options], cwd=PROJECT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _await_line(process: "subprocess.Popen[str]", text: str, seconds: float = 60) -> None:
    errors: IO[str] | None = process.stderr
    assert errors
    deadline, output = time.monotonic() + seconds, ""
    while text not in output:
        line = errors.readline()
        assert line and time.monotonic() < deadline, output
        output += line
