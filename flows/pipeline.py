"""The pipeline: meta-train, encode, then classifier and diffusion side by side, then evaluate and report."""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextvars import copy_context
from functools import partial
from typing import Any

from prefect import flow, get_run_logger

from functa.flows import stages
from functa.flows.config.digests import OPTIONAL, stages_of
from functa.flows.config.preflight import preflight
from functa.flows.config.schema import PipelineConfig
from functa.flows.gate import check_gate
from functa.flows.ledger import Ledger
from functa.flows.server.stage_runs import run_stage
from functa.flows.server.worker import outlive_the_worker, started_by_worker
from functa.tasks.dispatch.child import allow_children, stop_children
from functa.tasks.report.artifacts import publish
from functa.tasks.report.run_folder import load_folder, report_data

Stage = Callable[[str, dict[str, Any]], None]


@flow(name="pipeline", flow_run_name="pipeline {config.name}", persist_result=False)
def pipeline(root: str, *, from_root: str | None = None, config: PipelineConfig) -> dict[str, Any]:
    """Runs every stage that does not stand yet, and checks the gate; returns the metrics.

    As a run of its deployment each stage is a run of its own deployment too, on a worker that the server chooses; else
    all are computed in this process.

    Args:
        root: Where everything goes: a folder or s3://bucket/prefix. A config other than the one that stands there needs
            another root.
        config: Everything that the run is made of.
        from_root: Finished stages are taken over from this root where their digests agree.
    """
    preflight(config, root, "pipeline")
    ledger = Ledger(config, root, from_root)
    ledger.all_standing()  # a conflict in a late stage is told before the first one starts
    allow_children()
    by_deployment = started_by_worker()
    if by_deployment:
        outlive_the_worker()
    run = _logged(_by_deployment if by_deployment else _here)
    parameters = {"config": config, "root": root, "from_root": from_root}
    run("meta_train", parameters)
    run("encode", parameters)
    trainings = [stage for stage in stages_of(config) if stage in OPTIONAL]
    # Two trainings share the cores of one machine; on workers of their own each has all.
    apart = by_deployment or len(trainings) < 2
    share = {} if apart else {"threads": max(1, (os.cpu_count() or 1) // 2)}
    _side_by_side([partial(run, stage, parameters | share) for stage in trainings])
    run("evaluate", parameters)
    metrics = _publish(ledger)
    check_gate(ledger)
    return metrics


def _publish(ledger: Ledger) -> dict[str, Any]:
    """The run's artifacts on the pipeline's own page too, where an operator looks first; returns the metrics."""
    record = ledger.require("evaluate")
    folder = load_folder(ledger.output(record))
    publish(report_data(folder), folder)
    return record.figures


def _logged(run: Stage) -> Stage:
    """A line when a stage has finished, with its seconds."""

    def logged(stage: str, parameters: dict[str, Any]) -> None:
        begun = time.monotonic()
        run(stage, parameters)
        get_run_logger().info(f"{stage.replace('_', '-')}: finished after {time.monotonic() - begun:.0f} s")

    return logged


def _here(stage: str, parameters: dict[str, Any]) -> None:
    getattr(stages, stage)(**parameters)


def _by_deployment(stage: str, parameters: dict[str, Any]) -> None:
    """A failed child fails its parent."""
    config = parameters["config"].model_dump(mode="json")
    run_stage(stage.replace("_", "-"), parameters | {"config": config})


def _side_by_side(calls: Sequence[Callable[[], None]]) -> None:
    """Runs the calls in threads that see the parent flow's context; the first failure ends the others."""
    if not calls:
        return
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(copy_context().run, call) for call in calls]
        try:
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
        except BaseException:
            stop_children()
            raise
