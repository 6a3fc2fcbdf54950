"""Start Prefect's embedded server for one command, and end it with the command, however that ends."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from functa.flows.server.api import OperateError, configured_api

# Its standard input is a pipe that the operating system closes when this process ends, however that happens.
END_AFTER_US = 'read -r _; kill -TERM "$1"'

GRACE_SECONDS, STOP_SECONDS = 5.0, 25.0  # for a command to end in order after its server did, and then for trainings


@contextmanager
def embedded_server(exit_with_server: bool) -> Iterator[None]:
    """Start Prefect's embedded server if no API is configured, protected from the Ctrl-C meant for the command.

    A terminal sends SIGINT to every process of the command's group, and a server that ended at once could not record
    how the run ended. Prefect starts it as a plain child, so it is started here first, from a thread in which SIGINT
    is blocked: children inherit that, and the main thread still receives it. Prefect stops it when the command ends.
    Processes that tasks are sent to get its address, or each would start a server of its own.
    """
    if configured_api():
        yield
        return
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_EPHEMERAL_ENABLED, temporary_settings

    if not PREFECT_SERVER_EPHEMERAL_ENABLED:
        yield  # the user disabled it; Prefect reports what is missing
        return
    server = SubprocessASGIServer()
    already_runs = server.running  # of an earlier run in this process

    def start() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            server.start()
        except Exception as error:  # raised below, in the main thread
            failed.append(error)

    failed: list[Exception] = []
    starting = threading.Thread(target=start, name="embedded-server", daemon=True)
    starting.start()
    starting.join()
    if failed:
        raise OperateError(f"Prefect's embedded server did not start: {failed[0]}")
    if not already_runs and server.server_process is not None:
        end_with_this_process(server.server_process.pid)
    watch = ended_with(server.server_process) if exit_with_server else nullcontext()
    with temporary_settings({PREFECT_API_URL: server.api_url}), ended_by_sigterm(), watch:
        yield


def end_with_this_process(pid: int) -> None:
    """Let the process `pid` end when this one has ended, also by SIGKILL, after which nothing here could end it."""
    watcher = subprocess.Popen(
        ["/bin/sh", "-c", END_AFTER_US, "sh", str(pid)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    _watchers.append(watcher)


_watchers: list[subprocess.Popen[bytes]] = []  # kept: the end of a Popen closes its pipe


@contextmanager
def ended_with(server: Any) -> Iterator[None]:
    """End this process soon after the server (a Popen, or None) has ended: Prefect would retry requests for minutes.

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
        ours = {server.pid, *(watcher.pid for watcher in _watchers)}
        psutil.wait_procs([child for child in psutil.Process().children() if child.pid not in ours], STOP_SECONDS)
        by_signal = -status if status < 0 else 0
        cause = f" by {signal.Signals(by_signal).name}" if by_signal else ""
        sys.stderr.write(
            f"functa: Prefect's embedded server was ended{cause}; the same command continues where this one stopped\n"
        )
        sys.stderr.flush()
        os._exit(128 + (by_signal or signal.SIGTERM))

    if server is not None:
        threading.Thread(target=watch, name="embedded-server-ended", daemon=True).start()
    try:
        yield
    finally:
        left.set()


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the process in order, so that Prefect stops the server that it started.

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
