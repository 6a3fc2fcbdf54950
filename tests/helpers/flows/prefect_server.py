"""`functa up` as a real child process, for the tests that need what an operator has."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from functa.flows.server.api import basic

PROJECT = Path(__file__).resolve().parents[3]
PATIENCE = 60  # seconds that a busy server is asked again
COMMAND = """
import sys, json
from functa.flows.server.up import up
up(int(sys.argv[1]), sys.argv[2], **json.loads(sys.argv[3]))
"""


@dataclass(frozen=True)
class Served:
    """A running `functa up`."""

    process: subprocess.Popen[str]
    port: int
    home: Path  # its PREFECT_HOME
    root: Path  # where its deployments write
    printed: str = ""  # until it was ready

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def password(self) -> str:
        """Return the password that `functa up` keeps for this user's commands; empty for a server without one."""
        file = self.home / "functa" / f"password-{self.port}"
        return file.read_text() if file.exists() else ""

    @property
    def link(self) -> str:
        """Return the link that lets a browser in."""
        (found,) = re.findall(r"^Prefect UI +(http\S+)$", self.printed, re.MULTILINE)
        return str(found)

    def ask(self, path: str, body: dict[str, Any] | None = None, method: str | None = None) -> Any:
        """Return an answer of the server's API; POST if there is a body."""
        return ask(self.address, self.password, path, body, method)

    def environment(self) -> dict[str, str]:
        return clean_environment(self.home) | {"PREFECT_API_URL": f"{self.address}/api"}

    def family(self) -> list[psutil.Process]:
        """Return the command's process and all its descendants."""
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]


def ask(address: str, password: str, path: str, body: dict[str, Any] | None = None, method: str | None = None) -> Any:
    """Return an answer of a server's API; POST if there is a body.

    Where another process of the server holds SQLite's lock, it answers 503 and has changed nothing, or does not answer
    for a minute: as Prefect's own client does, ask again; what changes something is asked once, and waited for.
    """
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json"} | ({"authorization": basic(password)} if password else {})
    request = urllib.request.Request(f"{address}/api/{path}", data, headers, method=method)
    deadline, reads = time.monotonic() + PATIENCE, body is None or path.endswith("/filter")
    opener, patience = urllib.request.build_opener(urllib.request.ProxyHandler({})), PATIENCE if reads else 3 * PATIENCE
    while True:
        try:
            with opener.open(request, timeout=patience) as answer:
                return json.loads(answer.read() or "null")
        except TimeoutError:
            if not reads or time.monotonic() > deadline + 2 * PATIENCE:
                raise
        except urllib.error.HTTPError as error:
            if error.code != 503 or time.monotonic() > deadline:
                raise
        time.sleep(1)


def clean_environment(home: Path) -> dict[str, str]:
    """Return an environment that keeps the test and this machine's own Prefect apart."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_") and k != "DO_NOT_TRACK"}
    return kept | {"PREFECT_HOME": str(home)}


def free_port() -> int:
    """Return a port that no process serves."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def eventually(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Wait until the condition holds; fail, naming it, when time is up."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.5)
    return value


@contextlib.contextmanager
def serving(folder: Path, devices: str | None = None, **options: Any) -> Iterator[Served]:
    """Run `functa up` with a home of its own; stop it at the end unless the test has.

    devices: what it sees as CUDA_VISIBLE_DEVICES, for workers that hold a device each where there is none.
    """
    port, home, root = free_port(), folder / "home", folder / "root"
    faked = {} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(port), str(root), json.dumps(options)],
        cwd=PROJECT,
        env=clean_environment(home) | {"PYTHONUNBUFFERED": "1"} | faked,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        lines = []
        assert process.stdout is not None
        for line in process.stdout:  # ends with the process
            lines.append(line)
            if "Ctrl-C" in line:
                break
        assert process.poll() is None, "".join(lines)
        yield Served(process, port, home, root, "".join(lines))
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        process.communicate(timeout=90)
