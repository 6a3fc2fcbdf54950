"""`functa up`: Prefect's server, its workers and the deployments on this machine, stopped together.

The operator's other commands are in flows/server/doctor.py and flows/server/deployed.py.
"""

import os
import shlex
import time
import webbrowser
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

import functa
from functa.flows.config.schema import ConfigError
from functa.flows.server.api import (
    HOST,
    PASSWORD,
    POOL,
    PORT,
    SERVER_PASSWORD,
    STARTUP_SECONDS,
    OperateError,
    absolute,
    check_home,
    healthy,
    kept_password,
    local_api,
    new_password,
    password_file,
    port_fault,
    prefect_home,
    prepare_environment,
    using,
    write_private,
)
from functa.flows.server.console import text_console
from functa.flows.server.local_workers import PYTHON, Worker, allowed_places, newest_config, workers_of_this_machine
from functa.flows.server.processes import Child, Interrupted, left_behind, signals_caught, start, stop, wait
from functa.storage.places.allowed import ALLOWED_ROOTS, joined_places

DEFAULT_ROOT = "functa-runs/digits"

BOOTSTRAP_SECONDS = 180

WORKER_SECONDS = 90


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
    password = new_password()
    allowed = allowed_places(root)
    environment = environment_of(port, password, allowed)
    with signals_caught() as caught, kept_password(port, password):
        try:
            serve(children, caught, port, environment, console)
            slots = ["--gpus", str(len(workers) - 1), "--at-least"]  # other machines may have added theirs
            set_up(children, caught, port, environment, [*bootstrap_options(root, cron), *slots], console)
            work(children, caught, port, environment, workers, console)
            print_addresses(console, port, password, root, allowed, workers, cron)
            if open_browser:
                browse(port, password)
            wait(children, caught, lambda: False)
        except Interrupted:
            console.print()
            console.print("Stopping server, workers and runs (again: at once).")
        finally:
            stop(children[1:], caught)
            if children and len(caught) < 2:
                cancel_waiting(port, password)
            stop(children[:1], caught)
    console.print("Stopped: no process is left.")


def cancel_waiting(port: int, password: str) -> None:
    """Cancel runs that no worker has begun: the next `functa up` would start them unasked.

    Those that a schedule has planned stay. As far as the server answers: it ends next.
    """
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
    from prefect.client.schemas.objects import State, StateType
    from prefect.exceptions import PrefectException
    from prefect.states import Cancelled

    waiting = FlowRunFilterStateType(any_=[StateType.SCHEDULED, StateType.PENDING])
    asked = FlowRunFilter(state=FlowRunFilterState(type=waiting))
    with suppress(httpx.HTTPError, PrefectException):
        with using(local_api(port), password), get_client(sync_client=True) as client:
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


def bootstrap_options(root: str, cron: str | None) -> list[str]:
    """Return the options of deploy/bootstrap.py. Relative locations in a config mean those of this folder."""
    return ["--root", root, "--folder", str(Path.cwd())] + ([] if cron is None else ["--cron", cron])


def serve(children: list[Child], caught: list[int], port: int, environment: dict[str, str], console: Console) -> None:
    """Start Prefect's server, on this machine's own address alone."""
    with console.status("") as status:
        command = [*PYTHON, "functa.flows.server.guarded", "--port", str(port)]
        children.append(begin("server", command, port, environment))
        progress = progress_line(status.update, f"Prefect's server starts on {HOST}:{port}", children[-1].log)
        wait(children, caught, lambda: progress() and healthy(local_api(port)), STARTUP_SECONDS)


def set_up(
    children: list[Child],
    caught: list[int],
    port: int,
    environment: dict[str, str],
    options: list[str],
    console: Console,
) -> None:
    """Create work pool, queues, limit and deployments, by a child that ends by itself."""
    with console.status("") as status:
        child = begin("bootstrap", [*PYTHON, "functa.deploy.bootstrap", *options], port, environment)
        progress = progress_line(status.update, "Work pool, queues and deployments are set up", child.log)
        try:
            wait(children, caught, lambda: progress() and child.process.poll() is not None, BOOTSTRAP_SECONDS, child)
        finally:
            stop([child], caught)
    if child.process.returncode:
        raise OperateError(child.death())


def work(
    children: list[Child],
    caught: list[int],
    port: int,
    environment: dict[str, str],
    workers: list[Worker],
    console: Console,
) -> None:
    """Start the workers, and wait until all of them have answered."""
    started, password = datetime.now(UTC), environment[PASSWORD]
    names = {worker.name for worker in workers}
    for worker in workers:
        suffix = worker.name.rpartition(f"-{port}-")[2]
        children.append(begin(f"worker-{suffix}", worker.command(), port, environment | worker.environment()))
    with console.status("") as status:
        progress = progress_line(status.update, f"{len(workers)} workers start", children[-1].log)
        wait(
            children,
            caught,
            lambda: progress() and names <= answering(port, password, started),
            WORKER_SECONDS,
        )


def environment_of(port: int, password: str, allowed: list[str]) -> dict[str, str]:
    """Return the environment of server and workers: this server alone, whatever the user's profile names."""
    package = str(Path(functa.__file__).parents[1])  # where this package is imported from, installed or not
    return os.environ | {
        "PREFECT_API_URL": local_api(port),
        PASSWORD: password,
        SERVER_PASSWORD: password,
        ALLOWED_ROOTS: joined_places(allowed),
        "PREFECT_UI_URL": f"http://{HOST}:{port}",
        "PREFECT_SERVER_UI_API_URL": "/api",  # also where the UI is reached by another port, as through ssh
        "PREFECT_SERVER_API_HOST": HOST,
        "PREFECT_SERVER_API_PORT": str(port),
        # No page of another origin may read its answers.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://{HOST}:{port},http://localhost:{port}",
        "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")])),
        "PYTHONUNBUFFERED": "1",
        "NO_COLOR": "1",
    }


def begin(name: str, command: list[str], port: int, environment: dict[str, str]) -> Child:
    """Start a child whose output goes to a log of its own."""
    return start(name, command, environment, Path.cwd(), log_folder() / f"{name}-{port}.log")


def log_folder() -> Path:
    """Return the folder of the children's logs."""
    return prefect_home() / "functa"


def progress_line(show: Callable[[str], None], what: str, log: Path) -> Callable[[], bool]:
    """Return a function that shows what is waited for and for how long; it returns True, for use in a condition."""
    began = time.monotonic()

    def show_progress() -> bool:
        show(f"{what}: {time.monotonic() - began:.0f} s (log: {log})")
        return True

    return show_progress


def answering(port: int, password: str, since: datetime) -> set[str]:
    """Return the names of the workers that have reported to the server since then."""
    import httpx
    from prefect.client.orchestration import get_client

    try:
        with using(local_api(port), password), get_client(sync_client=True) as client:
            workers = client.read_workers_for_work_pool(POOL)
    except httpx.HTTPError:  # too busy to answer just now
        return set()
    return {w.name for w in workers if w.last_heartbeat_time and w.last_heartbeat_time > since}


def command_for(root: str) -> str:
    """Return the command that continues the root on the workers; the demo's where no preset made the root."""
    from functa.flows.config.command import command_line

    config = newest_config(root)
    command = command_line(config, root) if config is not None else ""
    return f"{command or f'functa run digits --root {shlex.quote(root)}'} --deployment"


def link(port: int, password: str) -> str:
    """Return the address that lets a browser in: it sets a cookie, once."""
    return f"http://{HOST}:{port}/?token={password.partition(':')[2]}"


def browse(port: int, password: str) -> None:
    """Open the UI in the user's browser.

    By a page that leads on, which only this user can read: everybody can read the command line of a browser.
    """
    page = password_file(port).with_suffix(".html")
    write_private(page, f'<meta http-equiv="refresh" content="0;url={link(port, password)}">')
    webbrowser.open(page.as_uri())


def print_addresses(
    console: Console,
    port: int,
    password: str,
    root: str,
    allowed: list[str],
    workers: list[Worker],
    cron: str | None = None,
) -> None:
    """Print the link to the UI, root, workers and logs."""
    devices = [worker.device for worker in workers if worker.queue == "gpu"]
    on = ", ".join(f"device {device}" for device in devices if device) or "no GPU"
    variable = "" if port == PORT else f"PREFECT_API_URL={local_api(port)} "
    for line in (
        f"Prefect UI   {link(port, password)}",
        f"Run it       there: Deployments > pipeline > Run; or here: {variable}{command_for(root)}",
        f"Runs go to   {root}",
        f"May use      {', '.join(allowed)} (others: {ALLOWED_ROOTS})",
        f"New images   of that root are encoded {'every night at 3' if cron is None else f'at {cron}'} (UTC)",
        f"Workers      1 on queue cpu, {len(devices)} on queue gpu ({on})",
        f"Logs         {log_folder()}",
        "Open the link once: it lets this browser in. Whoever has it can start runs.",
        "Ctrl-C stops server, workers and runs.",
    ):
        console.print(line, soft_wrap=True)
