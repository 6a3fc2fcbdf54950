"""The units of dispatched work: one Prefect task each, around plain functions. Jobs and results are small JSON."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from functa.storage.errors import StorageError, TransientError
from functa.tasks.config import DispatchConfig
from functa.tasks.dispatch.child import RunEnded, TrainingFailed, stop_children, train_in_child
from functa.tasks.dispatch.fan_out import run_ended
from functa.tasks.dispatch.progress import Lines, Pace, Progress, describe_row

if TYPE_CHECKING:  # loaded where the work is done: a worker process needs only what its own units load
    from functa.tasks.encoding.plan import EncodeJob, Planned, ShardGroup
    from functa.tasks.evaluation.evaluator_input import EvaluationJob
    from functa.tasks.evaluation.generation.features import FeatureJob
    from functa.tasks.inference.sample import SampleJob
    from functa.tasks.report.run_folder import RunFolder
    from functa.tasks.training_jobs import TrainingJob

P = ParamSpec("P")  # parameters of a unit of work

R = TypeVar("R")  # its result

OTHERS_SECONDS = 10.0  # for the run that waits to see first how another machine ended


def worth_retrying(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Return whether another try may succeed: after a killed process or a lost connection, not after bad input."""
    try:
        state.result()
    except TransientError:
        return True
    except (StorageError, RunEnded, ValueError, KeyError, NotImplementedError):
        return False
    except TrainingFailed as error:
        return error.may_pass
    except Exception:
        return True
    return False


def retried(unit: Task[P, R], dispatch: DispatchConfig) -> Task[P, R]:
    """Return the task with the retries of the config."""
    delays = [dispatch.retry_delay * 2**i for i in range(max(1, dispatch.retries))]
    return unit.with_options(retries=dispatch.retries, retry_delay_seconds=delays, retry_condition_fn=worth_retrying)


def unit(name: str, run_name: str) -> Callable[[Callable[P, R]], Task[P, R]]:
    """Make a task whose result Prefect does not store: receipts and checkpoints are the truth, pickles a risk."""
    return task(name=name, task_run_name=run_name, persist_result=False, cache_policy=NO_CACHE)


@unit("train", "train {job.what}")
def train(job: "TrainingJob", threads: int | None) -> dict[str, Any]:
    """Run one training in a process of its own; return its figures."""
    key, pace = f"{job.kind.replace('_', '-')}-progress", Pace()
    progress = Lines() if job.node else Progress(key, f"Training of {job.what}")  # the first machine's alone has rows

    def on_row(row: dict[str, Any]) -> None:
        if "note" in row:
            progress.note(row["note"])
        else:
            progress.show(row["step"], row["steps"], describe_row(row, pace.left(row["step"], row["steps"])))

    with _stopped_with_its_run():
        return train_in_child(job, on_row, threads)


@unit("train-node", "train {job.what} on node {job.node}")
def train_node(job: "TrainingJob", meeting: str) -> dict[str, Any]:
    """Run the part of one machine in a training on several, which all run at the same time; return its figures.

    The first one alone has figures and reports progress.
    """
    from functa.tasks.dispatch.node_address import agreed_address

    try:
        figures: dict[str, Any] = train.fn(job.model_copy(update={"rendezvous": agreed_address(job, meeting)}), None)
    except TrainingFailed as error:
        if error.may_pass:  # it may have lost the others: what ended the first of them is the reason to report
            time.sleep(OTHERS_SECONDS)
        raise
    return figures


@contextmanager
def _stopped_with_its_run() -> Iterator[None]:
    """Within, training stops once the run that requested it has ended: nobody would take its result."""
    done = threading.Event()

    def look() -> None:
        while not done.wait(1.0):
            if run_ended():
                stop_children()
                return

    threading.Thread(target=copy_context().run, args=(look,), daemon=True).start()
    try:
        yield
    except TrainingFailed as error:
        if run_ended():
            raise RunEnded(str(error)) from None
        raise
    finally:
        done.set()


@unit("plan-encoding", "plan encoding")
def plan_encoding(job: "EncodeJob") -> "Planned":
    """Plan fragments and calibrate the quantiser; return the groups of shards and what the commit will do."""
    from functa.tasks.encoding.plan import plan

    return plan(job)


@unit("encode-shards", "encode {group.split} shards {group.numbers}")
def encode_shards(job: "EncodeJob", group: "ShardGroup", images: int, run: str) -> dict[str, Any]:
    """Encode one group of shards; return its stats. `images` counts all groups, which share the name `run`."""
    from functa.tasks.encoding.encode import encode_group

    return encode_group(job, group, images, Lines().show, run=run, run_ended=run_ended)


@unit("finalise-encoding", "finalise encoding")
def finalise_encoding(job: "EncodeJob", planned: "Planned") -> dict[str, Any]:
    """Commit the fragments; return the functaset's info and its bad inputs."""
    from functa.tasks.encoding.finalise import finalise

    return finalise(job, planned)


def _timed(show: Callable[[int, int, str], None]) -> Callable[[int, int, str], None]:
    """Show progress with the time left. Raises RunEnded once the run that requested the work has ended."""
    pace = Pace()

    def timed(done: int, total: int, text: str) -> None:
        if run_ended():
            raise RunEnded(f"{text} when their run ended")
        show(done, total, text + pace.left(done, total))

    return timed


def _evaluation_progress() -> Callable[[str, int, int], None]:
    """Log an evaluator's progress, with the time left for each part of its work."""
    lines, parts = Lines(), dict[str, Callable[[int, int, str], None]]()

    def unfinished(done: int, total: int, line: str) -> None:
        if done < total:  # Prefect itself logs the end of the task
            lines.show(done, total, line)

    def show(what: str, done: int, total: int) -> None:
        parts.setdefault(what, _timed(unfinished))(done, total, f"{what}: {done}/{total}")

    return show


@unit("measure", "measure {name}")
def measure(name: str, job: "EvaluationJob") -> dict[str, Any]:
    """Run one evaluator; return its figures."""
    from prefect import get_run_logger

    from functa.tasks.evaluation import evaluators
    from functa.tasks.evaluation.evaluator_input import Messages

    return evaluators.find(name).run(job, Messages(_evaluation_progress(), get_run_logger().warning))


@unit("sample", "{job.count} samples from number {job.start}")
def sample_slice(job: "SampleJob") -> str:
    """Draw one slice of samples; return the URI of its file."""
    from functa.tasks.inference.sample import write_slice

    progress = Progress("sample-progress", f"{job.count} samples from number {job.start}")
    show = _timed(progress.show)
    return write_slice(job, lambda done, total: show(done, total, f"{done}/{total} denoising steps"))


@unit("compute-features", "features of {job.kind}, slice {job.part}")
def compute_features(job: "FeatureJob") -> str:
    """Compute features of one slice of a set, as moments that merge; return the URI of their file."""
    from functa.tasks.evaluation.generation.features import write_features

    part = f"{job.kind}, part {job.part + 1} of {job.parts}"
    show = _timed(Lines().show)
    return write_features(job, lambda done, total: show(done, total, f"{part}: features of {done}/{total} images"))


@unit("write-report", "write report")
def write_report(folder: "RunFolder") -> str:
    """Write report.html, metrics.json and the Prefect artifacts; return the report's URI."""
    from functa.tasks.report.artifacts import publish
    from functa.tasks.report.run_folder import write_run

    publish(write_run(folder), folder)
    return folder.report_uri
