"""The pipeline: meta-train, encode, then classifier and diffusion side by side, then evaluate and report."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

from prefect import flow
from prefect.deployments import run_deployment

from flows import stages
from flows.config import PipelineConfig
from flows.ledger import Ledger
from storage.stages import read_record
from tasks.dispatch import stop_children


@flow(name="pipeline", flow_run_name="pipeline {config.name}", persist_result=False)
def pipeline(
    config: PipelineConfig, root: str, from_root: str | None = None, through_deployments: bool = False
) -> dict[str, Any]:
    """Runs every stage that does not stand yet; returns the metrics.

    With through_deployments each stage is a run of its own deployment, on a worker that the server chooses.
    """
    run = _by_deployment if through_deployments else _here
    parameters = {"config": config, "root": root, "from_root": from_root}
    run("meta_train", parameters)
    run("encode", parameters)
    # Two trainings share the cores of one machine; on workers of their own each has all.
    share = {} if through_deployments else {"threads": max(1, (os.cpu_count() or 1) // 2)}
    _side_by_side(
        lambda: run("train_classifier", parameters | share),
        lambda: run("train_diffusion", parameters | share),
    )
    run("evaluate", parameters)
    record = read_record(Ledger(config, root, from_root).location, "evaluate")
    return {} if record is None else record.figures


def _here(stage: str, parameters: dict[str, Any]) -> None:
    getattr(stages, stage)(**parameters)


def _by_deployment(stage: str, parameters: dict[str, Any]) -> None:
    """Raises StageFailed if the child run does not complete: a failed child fails its parent."""
    name = stage.replace("_", "-")
    config = parameters["config"].model_dump(mode="json")
    run: Any = run_deployment(f"{name}/{name}", parameters=parameters | {"config": config}, as_subflow=True)
    if not run.state.is_completed():
        raise StageFailed(f"{name}: run '{run.name}' ended as {run.state.name}: {run.state.message or 'see its logs'}")


class StageFailed(Exception):
    """A stage's run on a worker did not complete."""


def _side_by_side(*calls: Callable[[], None]) -> None:
    """Runs the calls in threads that see the parent flow's context; the first failure ends the others."""
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(copy_context().run, call) for call in calls]
        try:
            for future in futures:
                future.result()
        except BaseException:
            stop_children()
            raise
