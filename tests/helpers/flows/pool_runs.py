"""Runs whose work other runs of the pool do: begin them, wait for their end, look at their children."""

from typing import Any

from functa.flows.config.schema import PipelineConfig
from tests.helpers.flows.prefect_server import eventually
from tests.helpers.flows.worker_cluster import Cluster

RUN_SECONDS = 600  # for one on a busy machine

WAITING = ("SCHEDULED", "PENDING", "RUNNING", "CANCELLING")


def on_pool(config: PipelineConfig) -> dict[str, Any]:
    """Return the config, as a run's parameter, with the work done by runs of the pool."""
    dispatch = config.dispatch.model_copy(update={"runner": "prefect"})
    return config.model_copy(update={"dispatch": dispatch}).model_dump(mode="json")


def begin(workplace: Cluster, stage: str, config: PipelineConfig, **parameters: Any) -> str:
    """Start a stage on the pool; return the run that waits for the others, on queue cpu."""
    first = workplace.run(stage, config=on_pool(config), **parameters)
    assert ends(workplace, first) == ("COMPLETED", "Moved")
    waits = message(workplace, first).split(" as run ")[1].split()[0]
    assert workplace.ask(f"flow_runs/{waits}")["work_queue_name"] == "cpu"
    return waits


def ends(workplace: Cluster, run: str, seconds: float = RUN_SECONDS) -> tuple[str, str]:
    """Return the type and the name of the run's last state."""
    eventually(lambda: workplace.state(run) not in WAITING, seconds, f"run {run} ends")
    state = workplace.ask(f"flow_runs/{run}")["state"]
    return state["type"], state["name"]


def message(workplace: Cluster, run: str) -> str:
    """Return what the run's state reports."""
    return str(workplace.ask(f"flow_runs/{run}")["state"]["message"])


def children(workplace: Cluster, run: str) -> list[dict[str, Any]]:
    """Return the child runs, as the UI shows them: by the parent that the server keeps."""
    of_it = {"flow_runs": {"parent_flow_run_id": {"any_": [run]}}, "limit": 200}
    found: list[dict[str, Any]] = workplace.ask("flow_runs/filter", of_it)
    assert all(child["parent_task_run_id"] for child in found)
    return found


def running(workplace: Cluster, run: str) -> list[dict[str, Any]]:
    """Return the child runs that a worker is at."""
    return [child for child in children(workplace, run) if child["state_type"] == "RUNNING"]


def lines(workplace: Cluster, runs: list[dict[str, Any]]) -> list[str]:
    """Return the log lines of these runs that the server has."""
    chosen = {"logs": {"flow_run_id": {"any_": [run["id"] for run in runs]}}, "limit": 200}
    return [str(line["message"]) for line in workplace.ask("logs/filter", chosen)]


def devices(workplace: Cluster, runs: list[dict[str, Any]]) -> set[str]:
    """Return the devices that the runs had, each of another worker."""
    return {line.split()[2] for line in lines(workplace, runs) if line.startswith("has device ")}
