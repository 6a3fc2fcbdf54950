"""`functa up`: Prefect's server, a worker and the deployments on this machine, stopped together.

The other things that an operator calls stand in flows/doctor.py and flows/deployed.py.
"""

import os
import platform
import sys
import time
import webbrowser
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from flows.children import Child, Interrupted, signals_caught, start, stop, wait
from flows.config import ConfigError
from flows.deployed import run_deployed
from flows.doctor import Check, doctor, print_checks
from flows.server import (
    HOST,
    POOL,
    PORT,
    QUEUES,
    STARTUP_SECONDS,
    OperateError,
    absolute,
    healthy,
    local_api,
    port_fault,
    prefect_home,
    prepare_environment,
)

__all__ = ["Check", "OperateError", "doctor", "prepare_environment", "print_checks", "run_deployed", "up"]

PROJECT = Path(__file__).resolve().parents[1]
DEFAULT_ROOT = "functa-runs/digits"
BOOTSTRAP_SECONDS = 180
WORKER_SECONDS = 90
PREFECT = [sys.executable, "-m", "prefect", "--no-prompt"]


def up(port: int = PORT, root: str | None = None, open_browser: bool = False, console: Console | None = None) -> None:
    """Serve until Ctrl-C or SIGTERM; then everything that was started is stopped, flow runs included.

    root: where runs started from the UI go unless the form says otherwise; default ./functa-runs/digits.
    Raises ConfigError for an impossible port, OperateError for a port that is taken or a child that died.
    """
    console = console or Console()
    prepare_environment()
    check_port(port)
    root = absolute(root or DEFAULT_ROOT)
    children: list[Child] = []
    with signals_caught() as caught:
        try:
            serve(children, caught, port, console)
            set_up(children, caught, port, root, console)
            work(children, caught, port, console)
            print_addresses(console, port, root)
            if open_browser:
                webbrowser.open(f"http://{HOST}:{port}")
            wait(children, caught, lambda: False)
        except Interrupted:
            console.print("\nStopping server, worker and runs (again: at once).")
        finally:
            stop(children, caught)
    console.print("Stopped: no process is left.")


def check_port(port: int) -> None:
    """One clear line before anything starts."""
    fault = port_fault(port)
    if fault.startswith("is no port"):
        raise ConfigError(f"--port {port} {fault}")
    if fault:
        raise OperateError(f"port {port} {fault}: name a free one, such as --port {port + 1 if port < 65535 else PORT}")


def serve(children: list[Child], caught: list[int], port: int, console: Console) -> None:
    """Prefect's server, on this machine's own address alone."""
    with console.status("") as status:
        children.append(begin("server", [*PREFECT, "server", "start", "--host", HOST, "--port", str(port)], port))
        progress = progress_line(status.update, f"Prefect's server starts on {HOST}:{port}", STARTUP_SECONDS)
        wait(children, caught, lambda: progress() and healthy(local_api(port)), STARTUP_SECONDS)


def set_up(children: list[Child], caught: list[int], port: int, root: str, console: Console) -> None:
    """Work pool, queues and deployments, by a child that ends by itself."""
    with console.status("") as status:
        child = begin("bootstrap", [sys.executable, "-m", "deploy.bootstrap", "--root", root], port)
        progress = progress_line(status.update, "Work pool, queues and deployments are set up", BOOTSTRAP_SECONDS)
        try:
            wait(children, caught, lambda: progress() and child.process.poll() is not None, BOOTSTRAP_SECONDS)
        finally:
            stop([child], caught)
    if child.process.returncode:
        raise OperateError(child.death())


def work(children: list[Child], caught: list[int], port: int, console: Console) -> None:
    """One worker for all queues: a pipeline run waits in it for its stages' runs, so it has no limit."""
    started = datetime.now(UTC)
    name = f"{platform.node() or 'worker'}-{port}"
    queues = [option for queue in QUEUES for option in ("--work-queue", queue)]
    command = [*PREFECT, "worker", "start", "--pool", POOL, "--type", "process", "--name", name, *queues]
    with console.status("") as status:
        children.append(begin("worker", [*command, "--install-policy", "never"], port))
        progress = progress_line(status.update, "The worker starts", WORKER_SECONDS)
        wait(children, caught, lambda: progress() and worker_answers(port, name, started), WORKER_SECONDS)


def begin(name: str, command: list[str], port: int) -> Child:
    """A child that speaks to this server alone, whatever the user's profile says, and can import the project."""
    environment = os.environ | {
        "PREFECT_API_URL": local_api(port),
        "PREFECT_UI_URL": f"http://{HOST}:{port}",
        "PREFECT_SERVER_API_HOST": HOST,
        "PREFECT_SERVER_API_PORT": str(port),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH", "")])),
        "PYTHONUNBUFFERED": "1",
        "NO_COLOR": "1",
    }
    return start(name, command, environment, PROJECT, log_folder() / f"{name}-{port}.log")


def log_folder() -> Path:
    """Where the children's logs go."""
    return prefect_home() / "functa"


def progress_line(show: Callable[[str], None], what: str, limit: int) -> Callable[[], bool]:
    """Shows what is waited for and for how long; always true, so that it stands before a condition."""
    began = time.monotonic()

    def tell() -> bool:
        show(f"{what}: {time.monotonic() - began:.0f} s (gives up after {limit} s)")
        return True

    return tell


def worker_answers(port: int, name: str, since: datetime) -> bool:
    """Whether this worker has reported to the server since then."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: local_api(port)}), get_client(sync_client=True) as client:
        workers = client.read_workers_for_work_pool(POOL)
    return any(w.name == name and w.last_heartbeat_time and w.last_heartbeat_time > since for w in workers)


def print_addresses(console: Console, port: int, root: str) -> None:
    """What an operator needs next."""
    variable = "" if port == PORT else f"PREFECT_API_URL={local_api(port)} "
    for line in (
        f"Prefect UI   http://{HOST}:{port}",
        f"Run it       there: Deployments > pipeline > Run; or here: {variable}functa run digits --deployment",
        f"Runs go to   {root}",
        f"Logs         {log_folder()}",
        "Ctrl-C stops server, worker and runs.",
    ):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
