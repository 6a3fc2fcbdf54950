"""Start Prefect's embedded server for one command, and end it with the command."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO

import functa
from functa.flows.server.api import (
    HOST,
    SERVER_PASSWORD,
    OperateError,
    configured_api,
    healthy,
    local_api,
    new_password,
    using,
)
from functa.flows.server.processes import Patience

GRACE_SECONDS, STOP_SECONDS = 5.0, 25.0  # for a command to end in order after its server did, and for children

SEND_SECONDS = 5.0  # for the last log lines to reach the server

for_all_threads = threading.Event()  # set while Prefect's settings of all threads are those of an embedded server


@contextmanager
def embedded_server(exit_with_server: bool) -> Iterator[None]:
    """Start a Prefect server for this command if no API is configured; stop it when the command ends, however it ends.

    It is in a session of its own: a terminal's Ctrl-C reaches every process of the command's group, and a server that
    ended at once could not record how the run ended. Processes that tasks are sent to get its address, or each would
    start a server of its own. Raises OperateError, with the server's own last line, if it does not start.
    """
    if configured_api():
        yield
        return
    from prefect.settings import PREFECT_SERVER_EPHEMERAL_ENABLED

    if not PREFECT_SERVER_EPHEMERAL_ENABLED:
        yield  # the user disabled it; Prefect reports what is missing
        return
    password = new_password()
    with _server(password) as (address, process):
        watch = ended_with(process) if exit_with_server else nullcontext()
        with using(address, password), _in_all_threads(), ended_by_sigterm(), watch:
            try:
                yield
            finally:
                if process.poll() is None:
                    _send_logs()


@contextmanager
def _in_all_threads() -> Iterator[None]:
    """Let threads that copy no context use these settings too: of Prefect's own, one would start another server."""
    from prefect import context

    before = context.GLOBAL_SETTINGS_CONTEXT
    context.GLOBAL_SETTINGS_CONTEXT = context.get_settings_context()
    for_all_threads.set()
    try:
        yield
    finally:
        for_all_threads.clear()
        context.GLOBAL_SETTINGS_CONTEXT = before


def _send_logs() -> None:
    """Wait until the server has the last log lines and events, which Prefect sends every few seconds.

    At the exit of the interpreter, where Prefect does it, the server has ended: it would retry for a minute, in vain.
    """
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    def drain() -> None:
        for worker in (APILogWorker, EventsWorker):
            worker.drain_all(timeout=SEND_SECONDS, at_exit=False)

    # A thread of its own: the caller's may run an event loop, as in a notebook.
    sending = threading.Thread(target=drain, name="embedded-server-logs", daemon=True)
    sending.start()
    sending.join(2 * SEND_SECONDS)


@contextmanager
def _server(password: str) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """Run a server without UI on a free port, with this password; yield its API's address and its process."""
    from prefect.settings import get_current_settings

    port = _free_port()
    environment = os.environ | get_current_settings().to_environment_variables(exclude_unset=True)
    environment |= {"PREFECT_SERVER_UI_ENABLED": "false", "PREFECT__SERVER_EPHEMERAL": "1"}
    environment[SERVER_PASSWORD] = password
    command = [sys.executable, "-P", "-m", "functa.flows.server.guarded", "--port", str(port)]
    command += ["--end-with", str(os.getpid())]
    package = str(Path(functa.__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            _wait_for(process, port, log)
            yield local_api(port), process
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for(process: "subprocess.Popen[str]", port: int, log: IO[str]) -> None:
    from prefect.settings import get_current_settings

    patience = Patience(process.pid, get_current_settings().server.ephemeral.startup_timeout_seconds)
    while not healthy(local_api(port)):
        if process.poll() is not None or patience.is_over():
            log.seek(0)
            lines = [line.strip() for line in log if line.strip()]
            how = "ended" if process.poll() is not None else f"did not answer within {patience.waited():.0f} s"
            raise OperateError(f"Prefect's embedded server {how}{': ' + lines[-1] if lines else ''}")
        time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])


@contextmanager
def ended_with(server: "subprocess.Popen[str]") -> Iterator[None]:
    """End this process soon after the server has ended: Prefect would retry requests for minutes.

    That happens when a signal goes to the whole process group, as from `timeout` or a service manager. What was
    written is kept, and trainings save a checkpoint.
    """
    left = threading.Event()

    def watch() -> None:
        status = server.wait()
        if left.wait(GRACE_SECONDS):
            return
        import psutil

        from functa.tasks.dispatch.child import stop_children

        stop_children()
        psutil.wait_procs([child for child in psutil.Process().children() if child.pid != server.pid], STOP_SECONDS)
        by_signal = -status if status < 0 else 0
        cause = f" by {signal.Signals(by_signal).name}" if by_signal else ""
        sys.stderr.write(
            f"functa: Prefect's embedded server was ended{cause}; the same command continues where this one stopped\n"
        )
        sys.stderr.flush()
        os._exit(128 + (by_signal or signal.SIGTERM))

    threading.Thread(target=watch, name="embedded-server-ended", daemon=True).start()
    try:
        yield
    finally:
        left.set()


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the process in order, so that the server is stopped.

    In a flow run Prefect receives it first, sets the run to Crashed, and passes it on. By default it would end the
    process at once, and the server would stay.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
