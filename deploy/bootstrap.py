"""Create what the server at PREFECT_API_URL needs: work pool, queues, limit, deployments, the watch over dead runs.

python -m functa.deploy.bootstrap [--root URI] [--gpus N] [--cron EXPRESSION]

Run twice, it changes nothing. `functa up` does it by itself.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import httpx
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import (
    GlobalConcurrencyLimitCreate,
    GlobalConcurrencyLimitUpdate,
    WorkPoolCreate,
    WorkPoolUpdate,
)
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound, PrefectException
from prefect.settings import PREFECT_API_URL
from prefect.utilities.templating import apply_values

from functa.flows.config.load import load_config
from functa.flows.server.api import GPU_LIMIT, absolute
from functa.flows.server.session import prepare_prefect
from functa.storage.errors import FunctaError, one_line
from functa.tasks.stage_table import STAGES

PREFECT_FILE = Path(__file__).with_name("prefect.yaml")

SET_FOLDER = "prefect.deployments.steps.set_working_directory"

POOL_TYPES = ("process", "docker", "kubernetes")

NIGHTLY = "0 3 * * *"

WATCH = "functa: runs without a heartbeat have crashed"

SILENCE = timedelta(seconds=90)  # three heartbeats of flows/server/api.py


class BootstrapError(FunctaError):
    """The server refused something, or cannot be reached: one line."""


@dataclass(frozen=True)
class Target:
    """The location of runs and what runs them. gpus: slots of the limit, None leaves an operator's number as it is."""

    root: str
    gpus: int | None = None
    at_least: bool = False  # more slots than gpus stay
    cron: str = NIGHTLY
    folder: str | None = None  # working folder of runs, for relative locations in a config; None: the worker's own
    pool_type: str = "process"
    job_template: Path | None = None


def bootstrap(target: Target) -> dict[str, list[str]]:
    """Create what is missing and update the rest; return the names of what exists, by kind."""
    document = render(yaml.safe_load(PREFECT_FILE.read_text()), target)
    queues: dict[str, list[str]] = {}
    for deployment in document["deployments"]:
        pool = deployment["work_pool"]
        wanted = queues.setdefault(pool["name"], [])
        if pool["work_queue_name"] not in wanted:
            wanted.append(pool["work_queue_name"])
    if not PREFECT_API_URL.value():
        raise BootstrapError("PREFECT_API_URL is not set: name a server, or start one with `functa up`")
    with get_client(sync_client=True) as client:
        if fault := client.api_healthcheck():
            raise BootstrapError(f"{client.api_url}: no Prefect server answers ({fault}); set PREFECT_API_URL to one")
        for pool_name, names in queues.items():
            create_pool(client, target, pool_name, names)
        slots = create_limit(client, target.gpus, target.at_least)
        watch_over_runs(client)
    deploy(document)
    return {
        "pools": list(queues),
        "queues": [name for names in queues.values() for name in names],
        "limits": [f"{GPU_LIMIT} ({slots} slot{'s'[: slots != 1]})"],
        "automations": [WATCH],
        "deployments": [deployment["name"] for deployment in document["deployments"]],
    }


def render(document: dict[str, Any], target: Target) -> dict[str, Any]:
    """Return prefect.yaml filled in: the root, the schedule, the preset as `config`, a deployment for each stage."""
    os.environ["FUNCTA_ROOT"] = target.root
    os.environ["FUNCTA_CRON"] = target.cron
    pools = document["definitions"]
    deployments: list[dict[str, Any]] = []
    for block in document["deployments"]:
        if block["name"] != "{{ command }}":
            deployments.append(block)
            continue
        for stage in STAGES.values():
            values = {"command": stage.command, "entrypoint": stage.entrypoint, "summary": stage.summary}
            values |= {"work_pool": pools[stage.queue]}
            deployments.append(cast(dict[str, Any], apply_values(block, values, remove_notset=False)))
    config = load_config(pools["preset"]).model_dump(mode="json")
    pull = [] if target.folder is None else [{SET_FOLDER: {"directory": target.folder}}]
    filled = apply_values(
        document | {"deployments": deployments, "pull": pull}, {"config": config}, remove_notset=False
    )
    return cast(dict[str, Any], filled)


def create_pool(client: SyncPrefectClient, target: Target, pool: str, queues: list[str]) -> None:
    """Create the pool and its queues where they are missing; keep an operator's limits on existing ones."""
    template = {} if target.job_template is None else {"base_job_template": json.loads(target.job_template.read_text())}
    described = "Spatial functa's workers."
    try:
        client.create_work_pool(WorkPoolCreate(name=pool, type=target.pool_type, description=described, **template))
    except ObjectAlreadyExists:
        found = client.read_work_pool(pool).type
        if found != target.pool_type:
            raise BootstrapError(
                f"work pool '{pool}' is of type '{found}', not '{target.pool_type}': delete or rename it"
            ) from None
        if template:
            client.update_work_pool(pool, WorkPoolUpdate(**template))
    existing = {queue.name for queue in client.read_work_queues(work_pool_name=pool)}
    for queue in queues:
        if queue not in existing:
            client.create_work_queue(queue, work_pool_name=pool)


def create_limit(client: SyncPrefectClient, gpus: int | None, at_least: bool = False) -> int:
    """Create the concurrency limit of runs that compute; return its slots. at_least keeps slots that were added."""
    try:
        existing = client.read_global_concurrency_limit_by_name(GPU_LIMIT)
    except ObjectNotFound:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=GPU_LIMIT, limit=gpus or 1))
        return gpus or 1
    if gpus is not None and at_least:
        gpus = max(gpus, existing.limit)
    if gpus is not None and existing.limit != gpus:
        client.update_global_concurrency_limit(GPU_LIMIT, GlobalConcurrencyLimitUpdate(limit=gpus))
    return existing.limit if gpus is None else gpus


def watch_over_runs(client: SyncPrefectClient) -> None:
    """Create the automation that marks a run as Crashed when its process and its worker have died."""
    ends = [f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")]
    heartbeat = "prefect.flow-run.heartbeat"
    trigger = EventTrigger(
        match={"prefect.resource.id": "prefect.flow-run.*"},
        for_each={"prefect.resource.id"},
        after={heartbeat},
        expect={heartbeat, *ends},
        posture=Posture.Proactive,
        threshold=1,
        within=SILENCE,
    )
    message = f"No heartbeat for {SILENCE.seconds} s: the process has died. What it wrote is kept; run it again."
    watch = AutomationCore(
        name=WATCH,
        description="Made by deploy/bootstrap.py. A run that ends reports it; one that was killed only falls silent.",
        trigger=trigger,
        actions=[ChangeFlowRunState(state=StateType.CRASHED, name="Crashed", message=message)],
    )
    existing = client.read_automations_by_name(WATCH)
    if not existing:
        client.create_automation(watch)
    elif _described(existing[0]) != _described(watch):  # replacing an equal one would drop the runs that it is watching
        client.update_automation(existing[0].id, watch)


def _described(automation: AutomationCore) -> dict[str, Any]:
    """Describe the automation without the ids that a server adds."""
    return automation.model_dump(include=set(AutomationCore.model_fields), exclude={"trigger": {"id"}})


def deploy(document: dict[str, Any]) -> None:
    """Run `prefect deploy --all`, so that every key of prefect.yaml means what Prefect's documentation defines."""
    with tempfile.TemporaryDirectory() as folder:
        rendered = Path(folder) / "prefect.yaml"
        rendered.write_text(yaml.safe_dump(document, sort_keys=False))
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(rendered)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise BootstrapError(f"prefect deploy failed: {last_line(done.stderr) or last_line(done.stdout)}")


def last_line(text: str) -> str:
    """Return the last line that is not empty."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def main() -> int:
    """Return the exit status: 0 done, 1 fault of the server, 2 of the arguments or the preset."""
    parser = argparse.ArgumentParser(prog="python -m functa.deploy.bootstrap", description=__doc__.splitlines()[0])
    parser.add_argument("--root", default="functa-runs/digits", help="where runs go by default")
    parser.add_argument("--gpus", type=positive, help="slots of the limit, one for each device (new: 1)")
    parser.add_argument("--at-least", action="store_true", help="never fewer slots than there are")
    parser.add_argument("--cron", type=schedule, default=NIGHTLY, help="when to look for new images, in UTC")
    parser.add_argument("--type", choices=POOL_TYPES, default="process", help="of the work pool")
    parser.add_argument("--folder", help="working folder of runs on the workers, for relative locations in a config")
    parser.add_argument("--job-template", type=template, help="a JSON file: the work pool's base job template")
    given = parser.parse_args()
    prepare_prefect()
    target = Target(
        absolute(given.root), given.gpus, given.at_least, given.cron, given.folder, given.type, given.job_template
    )
    try:
        made = bootstrap(target)
    except (FunctaError, httpx.HTTPError, PrefectException) as error:
        sys.stderr.write(f"bootstrap: {one_line(error)}\n")
        return error.exit_status if isinstance(error, FunctaError) else 1
    sys.stdout.write("; ".join(f"{what}: {', '.join(names)}" for what, names in made.items()) + "\n")
    return 0


def positive(text: str) -> int:
    """Parse a number of devices."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 1")
    return int(text)


def schedule(text: str) -> str:
    """Parse a cron expression with Prefect's own check."""
    from prefect.client.schemas.schedules import CronSchedule

    try:
        return CronSchedule(cron=text).cron
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no cron expression, such as '0 3 * * *'") from None


def template(text: str) -> Path:
    """Parse the path of a JSON file."""
    try:
        json.loads(Path(text).read_text())
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text}: no JSON file ({' '.join(str(error).split())})") from None
    return Path(text)


if __name__ == "__main__":
    sys.exit(main())
