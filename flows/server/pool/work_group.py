"""The flow of deployment `work-group`: one group of the work that a stage has handed to the pool's workers.

Its parameters choose one of the tasks below and give its job: no module, function or code is named by them, and every
location in them is opened as in any other run, within FUNCTA_ALLOWED_ROOTS.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from typing import Annotated, Any, Literal

import httpx
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Cancelled
from pydantic import Field

from functa.flows.server.worker import gpu_slot
from functa.models.config import Config
from functa.tasks import prefect_tasks
from functa.tasks.config import DispatchConfig
from functa.tasks.dispatch.child import RunEnded
from functa.tasks.dispatch.fan_out import ended_by
from functa.tasks.dispatch.work_pool import publish_result
from functa.tasks.encoding.plan import EncodeJob, ShardGroup
from functa.tasks.evaluation.evaluator_input import EvaluationJob
from functa.tasks.evaluation.generation.features import FeatureJob
from functa.tasks.inference.sample import SampleJob
from functa.tasks.training_jobs import PixelClassifierJob

LOOK_SECONDS = 10.0  # between looks at the run that requested the work


class PlanEncoding(Config):
    """Plan an encoding; calibrating the quantiser needs a device."""

    kind: Literal["plan-encoding"]
    job: EncodeJob


class EncodeShards(Config):
    """Encode a group of shards."""

    kind: Literal["encode-shards"]
    job: EncodeJob
    group: ShardGroup
    images: int
    run: str


class DrawSamples(Config):
    """Draw a slice of samples."""

    kind: Literal["sample"]
    job: SampleJob


class ComputeFeatures(Config):
    """Compute the features of a slice of images."""

    kind: Literal["compute-features"]
    job: FeatureJob


class Measure(Config):
    """Run one evaluator."""

    kind: Literal["measure"]
    name: str
    job: EvaluationJob


class TrainPixelClassifier(Config):
    """Train the classifier whose features distances use."""

    kind: Literal["train"]
    job: PixelClassifierJob
    threads: int | None = None


Work = Annotated[
    PlanEncoding | EncodeShards | DrawSamples | ComputeFeatures | Measure | TrainPixelClassifier,
    Field(discriminator="kind"),
]

UNITS: dict[str, Any] = {
    unit.name: unit
    for unit in (
        prefect_tasks.plan_encoding, prefect_tasks.encode_shards, prefect_tasks.sample_slice,
        prefect_tasks.compute_features, prefect_tasks.measure, prefect_tasks.train,
    )
}  # fmt: skip


@flow(name="work-group", persist_result=False)
def work_group(work: Work, *, retries: int = 2, retry_delay: float = 2.0) -> State[Any] | None:
    """Do one group of work of another run, which follows this one and reads its result.

    Args:
        work: The task and its job, as the requesting run describes it.
        retries: Retries of the task after a failure that may pass.
        retry_delay: Seconds before a retry, doubled each time.
    """
    dispatch = DispatchConfig(retries=retries, retry_delay=retry_delay)
    parameters = {name: getattr(work, name) for name in type(work).model_fields if name != "kind"}
    try:
        with ending_with_parent(flow_run.parent_flow_run_id), gpu_slot():
            result = prefect_tasks.retried(UNITS[work.kind], dispatch)(**parameters)
    except RunEnded as ended:
        return Cancelled(message=str(ended))
    publish_result(result)
    return None


@contextmanager
def ending_with_parent(parent: str | None) -> Iterator[None]:
    """Within, run_ended() is true once the requesting run has ended, is being cancelled, or has died.

    Raises RunEnded where it has ended already. A run that a person started has no parent.
    """
    if parent is None:
        yield
        return
    if _has_ended(parent):
        raise RunEnded("was not begun: the run that requested it has ended")
    over, done = threading.Event(), threading.Event()

    def look() -> None:
        while not over.is_set() and not done.wait(LOOK_SECONDS):
            if _has_ended(parent):
                over.set()

    threading.Thread(target=copy_context().run, args=(look,), daemon=True).start()
    try:
        with ended_by(over):
            yield
    finally:
        done.set()


def _has_ended(run: str) -> bool:
    """Return whether the run has ended or is about to; not while the server does not answer."""
    from uuid import UUID

    from prefect.exceptions import ObjectNotFound

    with suppress(httpx.HTTPError), get_client(sync_client=True) as client:
        try:
            state = client.read_flow_run(UUID(run)).state
        except ObjectNotFound:
            return True
        return state is not None and (state.is_final() or state.is_cancelling())
    return False
