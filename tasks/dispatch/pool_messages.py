"""Messages between a run and the runs of the pool that do its work: units of work as JSON, results as artifacts."""

import json
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from functa.storage.errors import FunctaError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun
    from prefect.tasks import Task

RESULT = "Result"  # description of the artifact by which a run returns its result

TAKEN = "Taken by the process of another group."  # message of the state of a run that no worker has to start


class NoResult(FunctaError):
    """A run completed without publishing a result."""


def run_name(unit: "Task[..., Any]", parameters: dict[str, Any]) -> str:
    """Return the name of the unit's task run, filled in."""
    return str(unit.task_run_name).format(**parameters)


def described(unit: "Task[..., Any]", parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the work as JSON: the task's name and its parameters."""
    values = {
        name: value.model_dump(mode="json") if isinstance(value, BaseModel) else value
        for name, value in parameters.items()
    }
    return {"kind": unit.name} | values


def publish_result(result: Any) -> None:
    """Return a result to the run that requested the work: a table of figures, which the UI shows too."""
    from prefect.artifacts import create_table_artifact

    plain = result.model_dump(mode="json") if isinstance(result, BaseModel) else result
    figures = plain if isinstance(plain, dict) else {"": plain}
    rows = [{"figure": name, "value": json.dumps(value)} for name, value in figures.items()]
    create_table_artifact(rows, description=RESULT)


def read_result(client: "SyncPrefectClient", run: "FlowRun") -> Any:
    """Return the result that a completed run has published. Raises NoResult."""
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterType

    of_it = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]), type=ArtifactFilterType(any_=["table"]))
    for artifact in client.read_artifacts(artifact_filter=of_it):
        if artifact.description == RESULT:
            rows = json.loads(str(artifact.data))
            figures = {row["figure"]: json.loads(row["value"]) for row in rows}
            return figures.get("", figures)
    raise NoResult(f"{run.name}: completed without a result; its worker has another version of the project")
