"""`functa up`: Prefect's server, its workers and the deployments on this machine, stopped together.

The operator's other commands are in flows/server/doctor.py and flows/server/deployed.py.
"""

import os
import platform
import sys
import time
import webbrowser
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

import functa
from functa.flows.config.schema import ConfigError
from functa.flows.server.api import (
    HOST,
    POOL,
    PORT,
    STARTUP_SECONDS,
    OperateError,
    absolute,
    check_home,
    healthy,
    local_api,
    port_fault,
    prefect_home,
    prepare_environment,
)
from functa.flows.server.console import text_console
from functa.flows.server.processes import Child, Interrupted, left_behind, signals_caught, start, stop, wait
from functa.storage.errors import StorageError

DEFAULT_ROOT = "functa-runs/digits"

BOOTSTRAP_SECONDS = 180

WORKER_SECONDS = 90

PYTHON = [sys.executable, "-P", "-m"]  # -P: no module is taken from the current folder

PREFECT = [*PYTHON, "prefect", "--no-prompt"]


@dataclass(frozen=True)
class Worker:
    """A process that takes runs of one queue. device: what it sees as CUDA_VISIBLE_DEVICES; None: what we see."""

    name: str
    queue: str
    limit: int | None = None
    device: str | None = None
    threads: int | None = None

    def command(self) -> list[str]:
        """Return the command of Prefect's own worker, which starts a process for each run."""
        limit = [] if self.limit is None else ["--limit", str(self.limit)]
        queue = ["--pool", POOL, "--work-queue", self.queue, "--type", "process", "--install-policy", "never"]
        return [*PREFECT, "worker", "start", "--name", self.name, *queue, *limit]

    def environment(self) -> dict[str, str]:
        """Return the environment variables that limit its runs to their share of the machine."""
        device = {} if self.device is None else {"CUDA_VISIBLE_DEVICES": self.device}
        return device | ({} if self.threads is None else {"OMP_NUM_THREADS": str(self.threads)})


def up(
    port: int = PORT,
    root: str | None = None,
    open_browser: bool = False,
    console: Console | None = None,
    gpus: int | None = None,
    cron: str | None = None,
) -> None:
    """Serve until Ctrl-C or SIGTERM; then everything that was started is stopped, flow runs included.

    root: root of runs started from the UI whose form names no other; default ./functa-runs/digits.
    gpus: workers with a device each; default: as many as this process sees, at least one.
    cron: when to look for new images of that root, in UTC; default: every night.
    Raises ConfigError for an impossible port or number, OperateError for a port that is taken or a child that died.
    """
    console = console or text_console()
    prepare_environment()
    check_port(port)
    check_cron(cron)
    check_home()
    workers = workers_of_this_machine(port, gpus)
    root = absolute(root or DEFAULT_ROOT)
    children: list[Child] = []
    with signals_caught() as caught:
        try:
            serve(children, caught, port, console)
            slots = ["--gpus", str(len(workers) - 1), "--at-least"]  # other machines may have added theirs
            set_up(children, caught, port, [*bootstrap_options(root, cron), *slots], console)
            work(children, caught, port, workers, console)
            print_addresses(console, port, root, workers, cron)
            if open_browser:
                webbrowser.open(f"http://{HOST}:{port}")
            wait(children, caught, lambda: False)
        except Interrupted:
            console.print("\nStopping server, workers and runs (again: at once).")
        finally:
            stop(children[1:], caught)
            if children and len(caught) < 2:
                cancel_waiting(port)
            stop(children[:1], caught)
    console.print("Stopped: no process is left.")


def cancel_waiting(port: int) -> None:
    """Cancel runs that no worker has begun: the next `functa up` would start them unasked.

    Those that a schedule has planned stay. As far as the server answers: it ends next.
    """
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
    from prefect.client.schemas.objects import State, StateType
    from prefect.exceptions import PrefectException
    from prefect.settings import PREFECT_API_URL, temporary_settings
    from prefect.states import Cancelled

    waiting = FlowRunFilterStateType(any_=[StateType.SCHEDULED, StateType.PENDING])
    asked = FlowRunFilter(state=FlowRunFilterState(type=waiting))
    with suppress(httpx.HTTPError, PrefectException):
        with temporary_settings({PREFECT_API_URL: local_api(port)}), get_client(sync_client=True) as client:
            for run in client.read_flow_runs(flow_run_filter=asked):
                if run.deployment_id is not None and not run.auto_scheduled:
                    ended: State[None] = Cancelled(message="`functa up` was stopped before a worker took it.")
                    client.set_flow_run_state(run.id, ended, force=True)


def check_port(port: int) -> None:
    """Raise ConfigError or OperateError if the port cannot be served, before anything starts."""
    fault = port_fault(port)
    if fault.startswith("is no port"):
        raise ConfigError(f"--port {port} {fault}")
    if fault and (left := left_behind(port)):
        raise OperateError(
            f"port {port} {fault} that a killed `functa up` left behind, with its workers: end them (kill "
            f"{' '.join(map(str, left))}), then start again"
        )
    if fault:
        raise OperateError(f"port {port} {fault}: name a free one, such as --port {port + 1 if port < 65535 else PORT}")


def check_cron(cron: str | None) -> None:
    """Raise ConfigError if the text is no cron expression; load Prefect only if there is one."""
    if cron is None:
        return
    from prefect.client.schemas.schedules import CronSchedule

    try:
        CronSchedule(cron=cron)
    except ValueError:
        raise ConfigError(f"--cron '{cron}': expected a cron expression, such as '0 3 * * *'") from None


def workers_of_this_machine(port: int, gpus: int | None) -> list[Worker]:
    """Return a worker for pipelines, without a limit as they only wait, and one for each device, limited to one run.

    Raises ConfigError where more devices are asked for than there are.
    """
    from functa.tasks.dispatch.child import threads_of_a_run
    from functa.tasks.dispatch.dask_cluster import visible_devices

    devices = visible_devices()
    count = max(1, len(devices)) if gpus is None else gpus
    if count < 1:
        raise ConfigError(f"--gpus {gpus}: expected at least 1 (without a GPU, its worker computes on the CPU)")
    if devices and count > len(devices):
        raise ConfigError(f"--gpus {gpus}, but this process sees {len(devices)}: {', '.join(devices)}")
    machine = f"{platform.node() or 'worker'}-{port}"
    threads = max(1, threads_of_a_run() // count) if count > 1 else None
    # On a machine without GPUs nothing is pinned: its runs share the cores.
    pinned = devices[:count] if devices else [None] * count
    return [
        Worker(f"{machine}-cpu", "cpu"),
        *(Worker(f"{machine}-gpu-{i}", "gpu", 1, device, threads) for i, device in enumerate(pinned)),
    ]


def bootstrap_options(root: str, cron: str | None) -> list[str]:
    """Return the options of deploy/bootstrap.py. Relative locations in a config mean those of this folder."""
    return ["--root", root, "--folder", str(Path.cwd())] + ([] if cron is None else ["--cron", cron])


def serve(children: list[Child], caught: list[int], port: int, console: Console) -> None:
    """Start Prefect's server, on this machine's own address alone."""
    with console.status("") as status:
        children.append(begin("server", [*PYTHON, "functa.flows.server.guarded", "--port", str(port)], port))
        progress = progress_line(status.update, f"Prefect's server starts on {HOST}:{port}", STARTUP_SECONDS)
        wait(children, caught, lambda: progress() and healthy(local_api(port)), STARTUP_SECONDS)


def set_up(children: list[Child], caught: list[int], port: int, options: list[str], console: Console) -> None:
    """Create work pool, queues, limit and deployments, by a child that ends by itself."""
    with console.status("") as status:
        child = begin("bootstrap", [*PYTHON, "functa.deploy.bootstrap", *options], port)
        progress = progress_line(status.update, "Work pool, queues and deployments are set up", BOOTSTRAP_SECONDS)
        try:
            wait(children, caught, lambda: progress() and child.process.poll() is not None, BOOTSTRAP_SECONDS)
        finally:
            stop([child], caught)
    if child.process.returncode:
        raise OperateError(child.death())


def work(children: list[Child], caught: list[int], port: int, workers: list[Worker], console: Console) -> None:
    """Start the workers, and wait until all of them have answered."""
    started = datetime.now(UTC)
    names = {worker.name for worker in workers}
    for worker in workers:
        suffix = worker.name.rpartition(f"-{port}-")[2]
        children.append(begin(f"worker-{suffix}", worker.command(), port, worker.environment()))
    with console.status("") as status:
        progress = progress_line(status.update, f"{len(workers)} workers start", WORKER_SECONDS)
        wait(children, caught, lambda: progress() and names <= answering(port, started), WORKER_SECONDS)


def begin(name: str, command: list[str], port: int, own: dict[str, str] | None = None) -> Child:
    """Start a child that uses this server alone, whatever the user's profile, and can import the project."""
    package = str(Path(functa.__file__).parents[1])  # where this package is imported from, installed or not
    environment = (
        os.environ
        | (own or {})
        | {
            "PREFECT_API_URL": local_api(port),
            "PREFECT_UI_URL": f"http://{HOST}:{port}",
            "PREFECT_SERVER_API_HOST": HOST,
            "PREFECT_SERVER_API_PORT": str(port),
            # Without a password: no page of another origin may call it through the operator's browser.
            "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://{HOST}:{port},http://localhost:{port}",
            "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")])),
            "PYTHONUNBUFFERED": "1",
            "NO_COLOR": "1",
        }
    )
    return start(name, command, environment, Path.cwd(), log_folder() / f"{name}-{port}.log")


def log_folder() -> Path:
    """Return the folder of the children's logs."""
    return prefect_home() / "functa"


def progress_line(show: Callable[[str], None], what: str, limit: int) -> Callable[[], bool]:
    """Return a function that shows what is waited for and for how long; it returns True, for use in a condition."""
    began = time.monotonic()

    def show_progress() -> bool:
        show(f"{what}: {time.monotonic() - began:.0f} s (gives up after {limit} s)")
        return True

    return show_progress


def answering(port: int, since: datetime) -> set[str]:
    """Return the names of the workers that have reported to the server since then."""
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    try:
        with temporary_settings({PREFECT_API_URL: local_api(port)}), get_client(sync_client=True) as client:
            workers = client.read_workers_for_work_pool(POOL)
    except httpx.HTTPError:  # too busy to answer just now
        return set()
    return {w.name for w in workers if w.last_heartbeat_time and w.last_heartbeat_time > since}


def command_for(root: str) -> str:
    """Return the command that continues the root on the workers; the demo's where no preset made the root."""
    from functa.flows.config.command import command_line
    from functa.flows.config.load import recorded_config
    from functa.storage.places.address import open_location
    from functa.storage.runs.stage_records import read_record
    from functa.tasks.stage_table import STAGES

    location, command = open_location(root), ""
    with suppress(StorageError, ValueError):  # a damaged record, one of another version, a location without answer
        records = [record for name in STAGES if (record := read_record(location, name)) is not None]
        newest = max(records, key=lambda record: record.started, default=None)
        command = command_line(recorded_config(newest), root) if newest is not None else ""
    return f"{command or 'functa run digits'} --deployment"


def print_addresses(console: Console, port: int, root: str, workers: list[Worker], cron: str | None = None) -> None:
    """Print addresses, root, workers and logs."""
    devices = [worker.device for worker in workers if worker.queue == "gpu"]
    on = ", ".join(f"device {device}" for device in devices if device) or "no device"
    variable = "" if port == PORT else f"PREFECT_API_URL={local_api(port)} "
    for line in (
        f"Prefect UI   http://{HOST}:{port}",
        f"Run it       there: Deployments > pipeline > Run; or here: {variable}{command_for(root)}",
        f"Runs go to   {root}",
        f"New images   of that root are encoded {'every night at 3' if cron is None else f'at {cron}'} (UTC)",
        f"Workers      1 on queue cpu, {len(devices)} on queue gpu ({on})",
        f"Logs         {log_folder()}",
        "Ctrl-C stops server, workers and runs.",
    ):
        console.print(line, soft_wrap=True)
