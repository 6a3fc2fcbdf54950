"""The units of dispatched work: one Prefect task each, around plain functions. Results are small JSON."""

import time
from collections.abc import Callable
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from functa.storage.errors import StorageError, TransientError
from functa.tasks.config import DispatchConfig
from functa.tasks.dispatch.child import GivenUp, TrainingFailed, train_in_child
from functa.tasks.dispatch.fan_out import given_up
from functa.tasks.dispatch.progress import Lines, Progress, describe_row, time_left


def worth_retrying(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Bad input and a diverged loss stay what they are; a killed process or a lost connection may pass."""
    try:
        state.result()
    except TransientError:
        return True
    except (StorageError, GivenUp, ValueError, KeyError, NotImplementedError):
        return False
    except TrainingFailed as error:
        return error.may_pass
    except Exception:
        return True
    return False


def retried(unit: Task[..., Any], dispatch: DispatchConfig) -> Task[..., Any]:
    """The task with the retries of the config."""
    delays = [dispatch.retry_delay * 2**i for i in range(max(1, dispatch.retries))]
    return unit.with_options(retries=dispatch.retries, retry_delay_seconds=delays, retry_condition_fn=worth_retrying)


def unit(name: str, run_name: str) -> Any:
    """A task that keeps nothing in Prefect: receipts and checkpoints are the truth, and pickles a way in."""
    return task(name=name, task_run_name=run_name, persist_result=False, cache_policy=NO_CACHE)


@unit("train", "train {what}")
def train(job: dict[str, Any], what: str, batch: int, threads: int | None) -> dict[str, Any]:
    """One training run in a process of its own; its figures. `what` names it to people."""
    progress = Progress(f"{job['kind'].replace('_', '-')}-progress", f"Training of {what}")

    def on_row(row: dict[str, Any]) -> None:
        if "note" in row:
            progress.note(row["note"])
        else:
            progress.show(row["step"], row["steps"], describe_row(row, batch))

    return train_in_child(job, on_row, threads)


@unit("plan-encoding", "plan encoding")
def plan_encoding(job: dict[str, Any]) -> dict[str, Any]:
    """Plans fragments and calibrates the quantiser; the shard groups to map over, and what the commit will do."""
    from functa.tasks.encoding.plan import EncodeJob, plan

    return plan(EncodeJob.model_validate(job)).model_dump(mode="json")


@unit("encode-shards", "encode {group[split]} shards {group[shards]}")
def encode_shards(job: dict[str, Any], group: dict[str, Any], images: int, run: str) -> dict[str, Any]:
    """Encodes one group of shards; its stats. `images` are those of all groups, `run` a name that these share."""
    from functa.tasks.encoding.encode import encode_group
    from functa.tasks.encoding.plan import EncodeJob, ShardGroup

    todo = ShardGroup.model_validate(group)
    return encode_group(EncodeJob.model_validate(job), todo, images, Lines().show, run=run, given_up=given_up)


@unit("finalise-encoding", "finalise encoding")
def finalise_encoding(job: dict[str, Any], planned: dict[str, Any]) -> dict[str, Any]:
    """Commits the fragments; the functaset's info and its bad inputs."""
    from functa.tasks.encoding.finalise import finalise
    from functa.tasks.encoding.plan import EncodeJob, Planned

    return finalise(EncodeJob.model_validate(job), Planned.model_validate(planned))


def _evaluation_progress() -> Callable[[str, int, int], None]:
    """Log an evaluator's progress, with the time that each part of its work has left."""
    lines, begun, reported = Lines(), dict[str, float](), time.monotonic()

    def show(what: str, done: int, total: int) -> None:
        nonlocal reported
        if given_up():
            raise GivenUp(f"{what}: {done}/{total} were measured when their run ended")
        seconds = time.monotonic() - begun.setdefault(what, reported)  # a part begins where the last one ended
        reported = time.monotonic()
        if done < total:  # Prefect logs the end of the task
            lines.show(done, total, f"{what}: {done}/{total}, {time_left(done, total, done / max(1e-9, seconds))}")

    return show


@unit("measure", "measure {name}")
def measure(name: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run one evaluator; return its figures."""
    from prefect import get_run_logger

    from functa.tasks.evaluation import evaluators
    from functa.tasks.evaluation.bench import EvaluationJob, Messages

    messages = Messages(_evaluation_progress(), get_run_logger().warning)
    return evaluators.find(name).run(EvaluationJob.model_validate(job), messages)


@unit("sample", "{job[count]} samples from number {job[start]}")
def sample_slice(job: dict[str, Any]) -> str:
    """One slice of samples; the URI of its file."""
    from functa.tasks.inference.sample import SampleJob, write_slice

    progress = Progress("sample-progress", f"{job['count']} samples from number {job['start']}")
    begun = time.monotonic()

    def show(done: int, total: int) -> None:
        if given_up():
            raise GivenUp(f"{done}/{total} samples were drawn when their run ended")
        left = time_left(done, total, done / max(1e-9, time.monotonic() - begun))
        progress.show(done, total, f"{done}/{total} samples drawn, {left}")

    return write_slice(SampleJob.model_validate(job), show)


@unit("compute-features", "features of {job[kind]}, slice {job[part]}")
def compute_features(job: dict[str, Any]) -> str:
    """Features of one slice of a set, as moments that merge; the URI of their file."""
    from functa.tasks.evaluation.generation.features import FeatureJob, write_features

    lines, begun, of = Lines(), time.monotonic(), f"{job['kind']}, part {job['part'] + 1} of {job['parts']}"

    def show(done: int, total: int) -> None:
        if given_up():
            raise GivenUp(f"features of {done}/{total} pictures were computed when their run ended")
        left = time_left(done, total, done / max(1e-9, time.monotonic() - begun))
        lines.show(done, total, f"{of}: features of {done}/{total} pictures, {left}")

    return write_features(FeatureJob.model_validate(job), show)


@unit("write-report", "write report")
def write_report(run: dict[str, Any]) -> str:
    """report.html, metrics.json and the Prefect artifacts; the report's URI."""
    from functa.tasks.report.artifacts import publish
    from functa.tasks.report.run_folder import RunFolder, write_run

    folder = RunFolder.model_validate(run)
    data = write_run(folder)
    publish(data, folder)
    return folder.report_uri
