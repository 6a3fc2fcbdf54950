"""The flow of deployment `work-group`: one group of the work that a stage has handed to the pool's workers.

Its parameters choose one of the tasks below and give its job: no module, function or code is named by them, and every
location in them is opened as in any other run, within FUNCTA_ALLOWED_ROOTS.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from typing import Annotated, Any, Literal, cast
from uuid import UUID

import httpx
from prefect import Flow, flow, runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import OrchestrationResult, SetStateStatus
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.flow_engine import run_flow
from prefect.states import Cancelled, Pending
from pydantic import Field

from functa.flows.server.worker import gpu_slot
from functa.models.config import Config
from functa.tasks import prefect_tasks
from functa.tasks.config import DispatchConfig
from functa.tasks.dispatch.child import RunEnded
from functa.tasks.dispatch.fan_out import ended_by
from functa.tasks.dispatch.pool_messages import TAKEN, publish_result
from functa.tasks.encoding.plan import EncodeJob, ShardGroup
from functa.tasks.evaluation.evaluator_input import EvaluationJob
from functa.tasks.evaluation.generation.features import FeatureJob
from functa.tasks.inference.sample import SampleJob
from functa.tasks.training_jobs import AnyJob, PixelClassifierJob

LOOK_SECONDS = 10.0  # between looks at the run that requested the work

PROCESS_SECONDS = 900.0  # for which a process begins further groups

PAUSE_SECONDS = 5.0  # for the parent to hand out more, before a process ends

_goes_on = False  # whether this process is at a further group


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


class TrainNode(Config):
    """Train on one of several machines, which meet at an address that the first of them chooses."""

    kind: Literal["train-node"]
    job: AnyJob
    meeting: str = Field(pattern="^[0-9a-f]{32}$")


Work = Annotated[
    PlanEncoding | EncodeShards | DrawSamples | ComputeFeatures | Measure | TrainPixelClassifier | TrainNode,
    Field(discriminator="kind"),
]

UNITS: dict[str, Any] = {
    unit.name: unit
    for unit in (
        prefect_tasks.plan_encoding, prefect_tasks.encode_shards, prefect_tasks.sample_slice,
        prefect_tasks.compute_features, prefect_tasks.measure, prefect_tasks.train, prefect_tasks.train_node,
    )
}  # fmt: skip


def go_on(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Do more groups of the same parent in this process, once its own is complete: it has loaded and compiled all.

    The groups are taken as a worker takes them, so that each is done once. After a while the process ends, so that its
    worker can turn to other runs that wait.
    """
    global _goes_on
    parent = None if _goes_on else runtime.flow_run.parent_flow_run_id
    if parent is None:
        return
    _goes_on, begun = True, time.monotonic()
    try:
        while state.is_completed() and time.monotonic() - begun < PROCESS_SECONDS:
            if (taken := _take(UUID(parent), flow_run) or _take(UUID(parent), flow_run, after=PAUSE_SECONDS)) is None:
                return
            state = cast("State[Any]", run_flow(work_group, flow_run=taken, return_type="state"))
    finally:
        _goes_on = False


def _take(parent: UUID, like: FlowRun, after: float = 0.0) -> FlowRun | None:
    """Return a run of the parent that nobody had begun and that is this process's now; None if there is none."""
    time.sleep(after)
    chosen = FlowRunFilter(
        parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[parent]),
        deployment_id=FlowRunFilterDeploymentId(any_=[like.deployment_id] if like.deployment_id else []),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
    )
    mine: State[Any] = Pending(message=TAKEN)
    with suppress(httpx.HTTPError), get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=chosen, sort=FlowRunSort.EXPECTED_START_TIME_ASC, limit=5):
            answer: OrchestrationResult[Any] = client.set_flow_run_state(run.id, mine)
            if answer.status == SetStateStatus.ACCEPT:
                return client.read_flow_run(run.id)
    return None


@flow(name="work-group", persist_result=False, on_completion=[go_on])
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
        with ending_early(runtime.flow_run.id, runtime.flow_run.parent_flow_run_id), gpu_slot():
            result = prefect_tasks.retried(UNITS[work.kind], dispatch)(**parameters)
    except RunEnded as ended:
        return Cancelled(message=str(ended))
    publish_result(result)
    return None


@contextmanager
def ending_early(own: str | None, parent: str | None) -> Iterator[None]:
    """Within, run_ended() is true once this run is cancelled, or the one that requested it has ended or has died.

    Raises RunEnded where that has ended already. A run that a person started has no parent. A parent is looked at
    twice: one that a busy server took for dead corrects its state.
    """
    if _has_ended(parent) and _has_ended(parent, LOOK_SECONDS):
        raise RunEnded("was not begun: the run that requested it has ended")
    over, done = threading.Event(), threading.Event()

    def look() -> None:
        while not over.is_set() and not done.wait(LOOK_SECONDS):
            if _has_ended(own) or (_has_ended(parent) and _has_ended(parent, LOOK_SECONDS)):
                over.set()

    threading.Thread(target=copy_context().run, args=(look,), daemon=True).start()
    try:
        with ended_by(over):
            yield
    finally:
        done.set()


def _has_ended(run: str | None, after: float = 0.0) -> bool:
    """Return whether the run has ended or is being cancelled; not while the server does not answer."""
    if run is None:
        return False
    time.sleep(after)
    with suppress(httpx.HTTPError), get_client(sync_client=True) as client:
        try:
            state = client.read_flow_run(UUID(run)).state
        except ObjectNotFound:
            return True
        return state is not None and (state.is_final() or state.is_cancelling())
    return False
