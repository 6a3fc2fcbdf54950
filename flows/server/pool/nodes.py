"""Train on several machines of the pool: one run for each, which all work at the same time."""

from typing import TYPE_CHECKING, Any
from uuid import uuid4

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import WorkerStatus
from prefect.exceptions import ObjectNotFound

from functa.flows.server.api import GPU_LIMIT, POOL, OperateError
from functa.tasks import prefect_tasks
from functa.tasks.config import DispatchConfig
from functa.tasks.dispatch.node_address import forget_address
from functa.tasks.dispatch.work_pool import run_on_pool

if TYPE_CHECKING:
    from functa.tasks.training_jobs import TrainingJob

FIX = f"start a worker and add a slot for each (`prefect gcl update {GPU_LIMIT} --limit N`), or lower dispatch.nodes"


def train_on_nodes(job: "TrainingJob", dispatch: DispatchConfig) -> dict[str, Any]:
    """Train with job.nodes runs of the pool's workers; return the figures.

    Nothing is tried again here: where one node fails, all end, and the same command continues at the newest checkpoint.
    Raises OperateError: fewer workers than nodes; GroupFailed, DispatchError: how the first node ended.
    """
    check_enough_workers(job.nodes)
    meeting, once = uuid4().hex, dispatch.model_copy(update={"retries": 0})
    each = [{"job": job.model_copy(update={"node": node}), "meeting": meeting} for node in range(job.nodes)]
    get_run_logger().info(f"{job.what} is trained by {job.nodes} runs, which are child runs of this one")
    try:
        figures: dict[str, Any] = run_on_pool(
            prefect_tasks.train_node, each, once, lambda results: None, together=True
        )[0]
    finally:
        forget_address(job.output, meeting)
    return figures


def check_enough_workers(nodes: int) -> None:
    """Raise OperateError where so many runs cannot work at the same time: they would wait for each other."""
    with get_client(sync_client=True) as client:
        try:
            slots = client.read_global_concurrency_limit_by_name(GPU_LIMIT).limit
        except ObjectNotFound:
            return  # each run names it, and the fix
        if slots < nodes:
            raise OperateError(
                f"dispatch.nodes={nodes}: limit '{GPU_LIMIT}' lets {slots} runs compute at the same time: {FIX}"
            )
        if client.read_work_pool(POOL).type != "process":
            return  # one worker starts many runs
        workers = client.read_workers_for_work_pool(POOL)
    online = sum(worker.status == WorkerStatus.ONLINE for worker in workers)
    if online < nodes:
        raise OperateError(f"dispatch.nodes={nodes}: {online} workers of pool '{POOL}' answer: {FIX}")
