"""Run a stage's deployment as a child of this flow run, and follow it to its end."""

import time
from typing import TYPE_CHECKING, Any

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.deployments import run_deployment

from functa.flows.server.api import POOL
from functa.flows.server.deployed import ServerSilent, unpolled_queues, watch
from functa.storage.errors import FunctaError

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

WAITING_SECONDS = 60.0  # until a line about a run that no worker took, and between two lines


class StageFailed(FunctaError):
    """A stage's run on a worker did not complete."""


def run_stage(name: str, parameters: dict[str, Any], queue: str | None = None) -> None:
    """Run deployment NAME/NAME as a child of this flow run, on a queue other than its own if one is named.

    Raises StageFailed if it does not complete.
    """
    run: Any = run_deployment(
        f"{name}/{name}", parameters=parameters, as_subflow=True, timeout=0, work_queue_name=queue
    )
    with get_client(sync_client=True) as client:
        run = follow(client, run.id, name)
    if not run.state.is_completed():
        raise StageFailed(f"{name}: run '{run.name}' ended as {run.state.name}: {run.state.message or 'see its logs'}")


def follow(client: "SyncPrefectClient", run_id: "UUID", name: str) -> "FlowRun":
    """Return the run in its final state. While no worker takes the run, the log gives the reason.

    Raises StageFailed when the server stays away: its run may go on without it.
    """
    from prefect.exceptions import ObjectNotFound

    run, logged = None, time.monotonic()
    try:
        for run in watch(client, run_id):
            waits = run is not None and run.state is not None and run.state.is_scheduled()
            if run is not None and waits and time.monotonic() - logged >= WAITING_SECONDS:
                logged = time.monotonic()
                get_run_logger().warning(f"{name}: {_why_it_waits(client, run)}")
    except ObjectNotFound:
        raise StageFailed(f"{name}: its run was deleted from the server; what it wrote is kept") from None
    except ServerSilent as error:
        raise StageFailed(f"{name}: {error}; its run may go on, and running the pipeline again continues it") from None
    assert run is not None  # what watch yields last
    return run


def _why_it_waits(client: "SyncPrefectClient", run: "FlowRun") -> str:
    queue = run.work_queue_name or ""
    if queue in unpolled_queues(client):
        return (
            f"no worker has polled queue {queue} of pool '{POOL}' for {WAITING_SECONDS:.0f} s: start one with `prefect "
            f"worker start --pool {POOL} --work-queue {queue} --limit 1`"
        )
    return f"its run waits: every worker of queue {queue} is at work"
