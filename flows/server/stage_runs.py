"""Run a stage's deployment as a child of this flow run, and follow it to its end."""

import time
from typing import TYPE_CHECKING, Any

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.deployments import run_deployment

from functa.flows.server.api import POOL
from functa.flows.server.deployed import SILENCE_SECONDS, unpolled_queues
from functa.storage.errors import FunctaError

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

POLL_SECONDS = 2.0

WAITING_SECONDS = 60.0  # until a word is said of a run that nobody took, and between two words


class StageFailed(FunctaError):
    """A stage's run on a worker did not complete."""


def run_stage(name: str, parameters: dict[str, Any]) -> None:
    """Runs deployment NAME/NAME as a child of this flow run. Raises StageFailed if it does not complete."""
    run: Any = run_deployment(f"{name}/{name}", parameters=parameters, as_subflow=True, timeout=0)
    with get_client(sync_client=True) as client:
        run = follow(client, run.id, name)
    if not run.state.is_completed():
        raise StageFailed(f"{name}: run '{run.name}' ended as {run.state.name}: {run.state.message or 'see its logs'}")


def follow(client: "SyncPrefectClient", run_id: "UUID", name: str) -> "FlowRun":
    """The run in its final state. A server that is away for a while does not end what workers do.

    While no worker takes the run the log says so, and why. Raises StageFailed when the server stays away.
    """
    import httpx
    from prefect.exceptions import ObjectNotFound

    heard = told = time.monotonic()
    while True:
        try:
            run = client.read_flow_run(run_id)
            heard = time.monotonic()
            if run.state is not None and run.state.is_final():
                return run
            waits = run.state is not None and run.state.is_scheduled()
            if waits and heard - told >= WAITING_SECONDS:
                told = heard
                get_run_logger().warning(f"{name}: {_why_it_waits(client, run)}")
        except ObjectNotFound:
            raise StageFailed(f"{name}: its run was deleted from the server; what it wrote stands") from None
        except httpx.HTTPError as error:
            silence = time.monotonic() - heard
            if silence > SILENCE_SECONDS:
                raise StageFailed(
                    f"{name}: the server has not answered for {silence:.0f} s ({type(error).__name__}); its run may go "
                    "on, and the same pipeline run again finds what it made"
                ) from None
        time.sleep(POLL_SECONDS)


def _why_it_waits(client: "SyncPrefectClient", run: "FlowRun") -> str:
    queue = run.work_queue_name or ""
    if queue in unpolled_queues(client):
        return (
            f"no worker has polled queue {queue} of pool '{POOL}' for {WAITING_SECONDS:.0f} s: start one with `prefect "
            f"worker start --pool {POOL} --work-queue {queue} --limit 1`"
        )
    return f"its run waits: every worker of queue {queue} is at work"
