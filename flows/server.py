"""Where Prefect's server is, and in which manners it is started. Light: neither prefect nor torch is imported."""

import http.client
import os
import signal
import socket
import sys
import threading
import tomllib
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

HOST = "127.0.0.1"
PORT = 4200
STARTUP_SECONDS = 120
GRACE_SECONDS, STOP_SECONDS = 5.0, 25.0  # for a command to end in order after its server did, and then for trainings
POOL = "functa"  # of deploy/prefect.yaml, as the queues
QUEUES = ("cpu", "gpu")
GPU_LIMIT = "functa-gpu"  # concurrency limit with a slot for each device

# Set unless the user did: no telemetry, no advertisement, patience with a slow machine, workers that poll often.
MANNERS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(STARTUP_SECONDS),
    "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://{HOST}",  # has no password: no page may speak to it
    "PREFECT_WORKER_QUERY_SECONDS": "2",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # the automation that finds dead runs waits for three of them
    # Slots outlive a restart of the server: leases in its memory would be lost, their slots held for ever.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
}


class OperateError(Exception):
    """Something in the world is wrong (port taken, no server, a child died): one line, exit status 1."""


def prepare_environment() -> None:
    """Prefect's settings, before it is imported; what the user set in environment or profile stays."""
    profile = active_profile()
    settings = dict(MANNERS)
    if not configured_api():
        settings["PREFECT_SERVER_EPHEMERAL_ENABLED"] = "true"  # the embedded server
    for name, value in settings.items():
        if name not in profile:
            os.environ.setdefault(name, value)


@contextmanager
def embedded_server() -> Iterator[None]:
    """Where no API is configured: Prefect's embedded server, out of reach of the Ctrl-C that is typed for the command.

    A terminal sends SIGINT to every process of the command's group, and a server that ended at once could not be told
    how the run ended. Prefect starts it as a plain child, so it is started here first, from a thread in which SIGINT
    is blocked: children inherit that, and the main thread still hears it. Prefect stops it when the command ends.
    Processes that tasks are sent to are told its address: each would start one of its own.
    """
    if configured_api():
        yield
        return
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_EPHEMERAL_ENABLED, temporary_settings

    if not PREFECT_SERVER_EPHEMERAL_ENABLED:
        yield  # by the user's wish; Prefect says what is missing
        return
    server = SubprocessASGIServer()

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
    with temporary_settings({PREFECT_API_URL: server.api_url}), ended_by_sigterm(), ended_with(server.server_process):
        yield


@contextmanager
def ended_with(server: Any) -> Iterator[None]:
    """Within, this process ends soon after the server (a Popen, or None) did: asking it is repeated for minutes.

    So it is when a signal goes to the whole process group, as from `timeout` or a service manager. What was written
    stands; trainings save where they are.
    """
    left = threading.Event()

    def watch() -> None:
        status = server.wait()
        if left.wait(GRACE_SECONDS):
            return
        import psutil

        from tasks.dispatch import stop_children

        stop_children()
        psutil.wait_procs([child for child in psutil.Process().children() if child.pid != server.pid], STOP_SECONDS)
        by_signal = -status if status < 0 else 0
        told = f" by {signal.Signals(by_signal).name}" if by_signal else ""
        sys.stderr.write(
            f"functa: Prefect's embedded server was ended{told}; the same command continues where this one stopped\n"
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
    """Within, SIGTERM ends the process in order, so that Prefect stops the server that it started at exit.

    In a flow run Prefect hears it first, has the run Crashed, and passes it on. By default it would end the process at
    once, and the server would stay.
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


def prefect_home() -> Path:
    """Prefect's folder: its database, its profiles and our logs."""
    return Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()


def active_profile() -> dict[str, str]:
    """Settings of the user's active Prefect profile; empty where there is none that can be read."""
    try:
        profiles = tomllib.loads((prefect_home() / "profiles.toml").read_text())
        name = os.environ.get("PREFECT_PROFILE") or profiles.get("active", "")
        return {str(key): str(value) for key, value in profiles.get("profiles", {}).get(name, {}).items()}
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError, AttributeError):
        return {}


def absolute(root: str) -> str:
    """A URI as it is; a path so that a worker in another folder means the same one."""
    return root if "://" in root else str(Path(root).expanduser().absolute())


def configured_api() -> str:
    """PREFECT_API_URL from environment or profile; empty: neither has one."""
    return (os.environ.get("PREFECT_API_URL") or active_profile().get("PREFECT_API_URL", "")).rstrip("/")


def local_api(port: int) -> str:
    """Address of the API that `functa up` serves."""
    return f"http://{HOST}:{port}/api"


def fetch(address: str, timeout: float = 3.0) -> bytes:
    """A page's body. Raises OSError or ValueError where there is none."""
    loopback = urlsplit(address).hostname in (HOST, "localhost", "::1")
    # A proxy from the environment is never asked for this machine's own addresses.
    opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if loopback else []))
    with opener.open(address, timeout=timeout) as answer:
        return bytes(answer.read())


def healthy(api: str) -> bool:
    """Whether a Prefect server answers at this API address."""
    try:
        return fetch(f"{api}/health").strip() == b"true"
    except (OSError, ValueError, http.client.HTTPException):
        return False


def port_fault(port: int) -> str:
    """Why the port cannot be served on this machine; empty: it can."""
    if not 0 < port < 65536:
        return "is no port: 1 to 65535 are"
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except PermissionError:
            return "may only be opened by root"
        except OSError:
            return "is taken by a Prefect server" if healthy(local_api(port)) else "is taken by another program"
    return ""
