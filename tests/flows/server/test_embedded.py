"""Prefect's embedded server ends with the command that started it, and reports why it cannot start."""

import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from prefect import context
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_EPHEMERAL_ENABLED, temporary_settings

from functa.flows.server import embedded
from functa.flows.server.api import OperateError
from functa.flows.server.session import check_workers, prepare_prefect

EMBEDDED = """
import sys
from functa.flows.server.session import prefect_session
from prefect.settings import PREFECT_API_URL
with prefect_session():
    print(PREFECT_API_URL.value(), flush=True)
    sys.stdin.read()
"""


@pytest.mark.server
@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_embedded_server_ends_with_its_command(how: signal.Signals, home: Path) -> None:
    command = subprocess.Popen(
        [sys.executable, "-c", EMBEDDED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert command.stdout is not None
    address = command.stdout.readline().strip()
    assert address.startswith("http://127.0.0.1:")
    servers = psutil.Process(command.pid).children(recursive=True)
    assert servers
    command.send_signal(how)
    command.wait(60)
    assert psutil.wait_procs(servers, 60)[1] == []


@pytest.mark.server
@pytest.mark.slow
def test_commands_that_start_at_the_same_moment_in_a_new_home_all_get_a_server(home: Path) -> None:
    commands = [
        subprocess.Popen(
            [sys.executable, "-c", EMBEDDED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
        )
        for _ in range(3)
    ]
    answers = [command.communicate("", timeout=250)[0].strip() for command in commands]
    assert all(answer.startswith("http://127.0.0.1:") for answer in answers), answers
    assert [command.returncode for command in commands] == [0, 0, 0]


@pytest.mark.server
def test_an_embedded_server_that_cannot_start_is_reported_with_its_own_last_line(home: Path) -> None:
    nowhere = {"PREFECT_API_DATABASE_CONNECTION_URL": "postgresql+asyncpg://u:p@127.0.0.1:9/none"}
    command = subprocess.run(
        [sys.executable, "-c", EMBEDDED], stdin=subprocess.DEVNULL, capture_output=True, text=True,
        env=os.environ | nowhere, timeout=200, check=False,
    )  # fmt: skip
    assert command.returncode
    assert re.search(r"OperateError: Prefect's embedded server ended: \S", command.stderr), command.stderr[-2000:]


LAST_WORDS = """
from functa.flows.server.session import prefect_session
with prefect_session():
    from prefect import flow, get_run_logger
    @flow
    def f():
        get_run_logger().info("the last words")
    f()
"""


@pytest.mark.server
@pytest.mark.slow
def test_the_server_has_every_log_line_before_it_ends_and_the_command_ends_at_once(home: Path) -> None:
    """Else Prefect would try for a minute to send them to the server that has ended."""
    done = subprocess.run(
        [sys.executable, "-c", f"{LAST_WORDS}import time; print(time.time(), flush=True)"],
        capture_output=True, text=True, env=os.environ | {"PREFECT_LOGGING_TO_API_BATCH_INTERVAL": "60"}, timeout=200,
    )  # fmt: skip
    seconds = time.time() - float(done.stdout.splitlines()[-1])
    assert "Error logging to API" not in done.stderr
    assert seconds < 30, done.stderr
    with sqlite3.connect(home / "prefect.db") as database:
        assert database.execute("select count(*) from log where message = 'the last words'").fetchone() == (1,)


def test_a_thread_without_a_context_uses_the_embedded_server_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else Prefect starts a second server for it, which outlives a killed command."""

    class Server:
        def poll(self) -> int:
            return 0

    @contextmanager
    def started(password: str) -> Iterator[tuple[str, Server]]:
        yield "http://127.0.0.1:9/api", Server()

    monkeypatch.setattr(embedded, "configured_api", lambda: "")
    monkeypatch.setattr(embedded, "_server", started)
    seen = []
    with (
        temporary_settings({PREFECT_SERVER_EPHEMERAL_ENABLED: True, PREFECT_API_URL: None}),
        embedded.embedded_server(exit_with_server=False),
    ):
        prepare_prefect()  # as the import of a flow does
        with pytest.raises(OperateError, match=r"no worker polls: start `functa up` and set PREFECT_API_URL"):
            check_workers()
        thread = threading.Thread(target=lambda: seen.append(PREFECT_API_URL.value()))
        thread.start()
        thread.join()
    assert seen == ["http://127.0.0.1:9/api"]
    assert context.GLOBAL_SETTINGS_CONTEXT.settings.api.url != seen[0]
