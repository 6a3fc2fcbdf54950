"""Build the Prefect flow of a stage from its entry in the table and from the function that does its work."""

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any

from prefect import Flow, flow, get_run_logger
from prefect.client.schemas.objects import State

from functa.flows.config.digests import require_stage
from functa.flows.config.load import with_absolute_images
from functa.flows.config.preflight import preflight
from functa.flows.config.schema import PipelineConfig
from functa.flows.ledger import Ledger
from functa.flows.server.api import WAITING_QUEUE
from functa.flows.server.session import check_workers, prepare_prefect
from functa.flows.server.worker import gpu_slot, moved_to_cpu_queue
from functa.storage.errors import StorageError
from functa.storage.images.source import listed_once
from functa.storage.runs.stage_records import StageRecord, read_record
from functa.tasks.stage_table import STAGES, Stage
from functa.tasks.training_jobs import WAIT_SECONDS, this_node

prepare_prefect()  # for a caller who imports a flow, this one's or the pipeline's, and calls it

Keyword = inspect.Parameter.KEYWORD_ONLY

ARGUMENTS = """
Args:
    root: Folder or s3://bucket/prefix of the run. A config other than the one used there before needs another root.
    config: All settings of the run.
    from_root: Finished stages are reused from this root where their digests agree.
"""

THREADS = "    threads: Threads of the training process; empty: all cores.\n"


def queue_of(stage: Stage, config: PipelineConfig) -> str:
    """Return the queue of the stage's run: one whose work is done by other runs of the pool needs no device itself."""
    dispatch = config.dispatch
    waits = dispatch.trains_on_pool if stage.trains else dispatch.runner == "prefect"
    return WAITING_QUEUE if waits else stage.queue


def stage_flow(work: Callable[..., None]) -> Flow[..., Any]:
    """Make a flow of `work(ledger, **options)`, the function named like its stage in the table.

    The flow does nothing if the stage is up to date, and otherwise requires the stage's inputs. Its options are those
    of the table, and `threads` for a stage that trains.
    """
    stage = STAGES[work.__name__]

    def run(root: str, *, from_root: str | None = None, config: PipelineConfig, **options: Any) -> State[None] | None:
        on_pool = config.dispatch.runner == "prefect"
        if on_pool:
            if queue_of(stage, config) == WAITING_QUEUE and (moved := moved_to_cpu_queue()):
                return moved
            config = with_absolute_images(config)  # the workers' folders are others
        # The slot first: whoever held it until now may have done this very stage.
        with gpu_slot() if queue_of(stage, config) == "gpu" else nullcontext(), listed_once():
            ledger = Ledger(config, root, from_root)
            if any(options[name] for name, option in stage.options.items() if option.again):
                ledger.require_begun(stage.name)
            elif _up_to_date(ledger, stage):
                return None
            check_takes_part(ledger, stage)
            ledger.require_inputs(stage.name)
            if on_pool:
                check_workers()
            work(ledger, **options)
        return None

    run.__name__, run.__qualname__, run.__module__ = work.__name__, work.__qualname__, work.__module__
    run.__signature__ = _signature(stage)  # type: ignore[attr-defined]  # typeshed lacks it; Prefect makes a form of it
    own = [f"    {name}: {option.help}\n" for name, option in stage.options.items()]
    run.__doc__ = f"{stage.summary}\n{ARGUMENTS}{''.join(own)}{THREADS if stage.trains else ''}"
    named = f"{stage.command} {{config.name}}"
    return flow(name=stage.command, flow_run_name=named, persist_result=False)(run)


def load_stage(name: str) -> Flow[..., Any]:
    """Return the flow of a stage of the table."""
    stage = STAGES[name]
    found: Flow[..., Any] = getattr(import_module(stage.module), stage.name)
    return found


@contextmanager
def taking_part(ledger: Ledger, stage: str) -> Iterator[StageRecord]:
    """Yield a training's record: on the first machine as `Ledger.working`, on others once the first has written it.

    Raises StorageError where it does not: it was not started, or its root is another one.
    """
    if not this_node(ledger.config.dispatch):
        with ledger.working(stage) as record:
            yield record
        return
    until = time.monotonic() + WAIT_SECONDS
    while (found := read_record(ledger.location, stage)) is None or found.state != "running":
        if time.monotonic() > until:
            raise StorageError(
                f"{ledger.root}: node 0 has not begun {STAGES[stage].command} there within {WAIT_SECONDS:.0f} s: start "
                f"the same command on it, with a root that all machines share"
            )
        time.sleep(1)
    yield found


def check_takes_part(ledger: Ledger, stage: Stage) -> None:
    """Raise StorageError for a stage that the first machine does alone, on another one."""
    node = this_node(ledger.config.dispatch)
    if node and not stage.trains:
        raise StorageError(
            f"{stage.command}: node 0 does it alone; on node {node} run only the stages that train, such as `functa "
            f"train-diffusion`, beside the same command on node 0"
        )


def _signature(stage: Stage) -> inspect.Signature:
    parameters = [
        inspect.Parameter("root", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=str),
        inspect.Parameter("from_root", Keyword, default=None, annotation=str | None),
        *(inspect.Parameter(name, Keyword, default=False, annotation=bool) for name in stage.options),
    ]
    if stage.trains:
        parameters.append(inspect.Parameter("threads", Keyword, default=None, annotation=int | None))
    parameters.append(inspect.Parameter("config", Keyword, annotation=PipelineConfig))
    return inspect.Signature(parameters, return_annotation=None)


def _up_to_date(ledger: Ledger, stage: Stage) -> bool:
    require_stage(ledger.config, stage.name)
    record = ledger.current(stage.name, must_ask=True)
    if record is None:
        notes = preflight(ledger.config, ledger.root, stage.name)
        if not stage.inputs:  # the first stage of a run; those after it would repeat them
            for note in notes:
                get_run_logger().warning(note)
        return False
    get_run_logger().info(
        f"{stage.command} is up to date in {ledger.output(record)}: nothing to do{ledger.newer_commit_note(record)}"
    )
    return True
