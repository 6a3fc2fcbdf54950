"""The pipeline: all stages in the order of their inputs, then the quality gate."""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from prefect import flow, get_run_logger, runtime

from functa.flows.config.digests import levels
from functa.flows.config.load import load_config
from functa.flows.config.preflight import preflight
from functa.flows.config.presets import preset_names
from functa.flows.config.schema import ConfigError, PipelineConfig
from functa.flows.gate import check_gate
from functa.flows.ledger import Ledger
from functa.flows.server.pool.stage_runs import run_stage
from functa.flows.server.session import check_workers
from functa.flows.server.worker import outlive_the_worker, started_by_worker
from functa.flows.stage_flow import load_stage, queue_of
from functa.storage.images.source import listed_once
from functa.tasks.dispatch.child import allow_children, stop_children
from functa.tasks.report.artifacts import publish
from functa.tasks.report.run_folder import load_folder, report_data
from functa.tasks.stage_table import STAGES

Stage = Callable[[str, dict[str, Any]], None]

if TYPE_CHECKING:
    PresetName = str
else:
    PresetName = Literal[tuple(preset_names())]  # a list to choose from in the run form


def _run_name() -> str:
    given = runtime.flow_run.parameters
    config = given["config"]
    name = given.get("preset") or (config["name"] if isinstance(config, dict) else config.name)
    return f"pipeline {name}"


@flow(name="pipeline", flow_run_name=_run_name, persist_result=False)
def pipeline(
    root: str,
    *,
    from_root: str | None = None,
    preset: PresetName | None = None,
    overrides: list[str] | None = None,
    config: PipelineConfig,
) -> dict[str, Any]:
    """Run every stage that is not up to date, and check the gate; return the metrics.

    As a run of its deployment each stage is a run of its own deployment too, on a worker that the server chooses;
    otherwise all stages run in this process.

    Args:
        root: Folder or s3://bucket/prefix of the run. A config other than the one used there before needs another root.
        preset: Run this preset instead of the config below. Empty: the config below.
        overrides: KEY=VALUE settings on top of the preset, such as field.width=256.
        config: All settings of the run, where no preset is chosen.
        from_root: Finished stages are reused from this root where their digests agree.
    """
    if preset is not None:
        config = load_config(preset, overrides)
    elif overrides:
        raise ConfigError("overrides go with a preset: choose one, or change the config itself")
    with listed_once():  # for all stages that this process runs: what arrives later is for the next run
        return _run(config, root, from_root)


def _run(config: PipelineConfig, root: str, from_root: str | None) -> dict[str, Any]:
    """Run the stages of a config and check its gate; return the metrics."""
    preflight(config, root, "pipeline")
    if config.dispatch.runner == "prefect":
        check_workers()
    ledger = Ledger(config, root, from_root)
    ledger.all_up_to_date()  # a conflict in a late stage is reported before the first one starts
    allow_children()
    by_deployment = started_by_worker()
    if by_deployment:
        outlive_the_worker()
    run = _logged(_by_deployment if by_deployment else _here)
    parameters = {"config": config, "root": root, "from_root": from_root}
    for level in levels(config):
        training = [stage for stage in level if STAGES[stage].trains]
        # Trainings side by side share the cores of this machine; on workers of their own each has all.
        shared = len(training) > 1 and not by_deployment
        share = {"threads": max(1, (os.cpu_count() or 1) // len(training))} if shared else {}
        calls = [partial(run, stage, parameters | (share if stage in training else {})) for stage in level]
        # Two trainings on nodes of one pool could each get a part of their workers, and wait for the rest for ever.
        for at_once in [[call] for call in calls] if config.dispatch.trains_on_pool else [calls]:
            _side_by_side(at_once)
    metrics = _publish(ledger)
    check_gate(ledger)
    return metrics


def _publish(ledger: Ledger) -> dict[str, Any]:
    """Show the run's artifacts on the pipeline's own page too, where an operator looks first; return the metrics."""
    record = ledger.require("evaluate")
    folder = load_folder(ledger.output(record))
    publish(report_data(folder), folder)
    return record.figures


def _logged(run: Stage) -> Stage:
    """Log a line when a stage has finished, with its seconds."""

    def logged(stage: str, parameters: dict[str, Any]) -> None:
        begun = time.monotonic()
        run(stage, parameters)
        get_run_logger().info(f"{STAGES[stage].command}: finished after {time.monotonic() - begun:.0f} s")

    return logged


def _here(stage: str, parameters: dict[str, Any]) -> None:
    load_stage(stage)(**parameters)


def _by_deployment(stage: str, parameters: dict[str, Any]) -> None:
    """Run the stage's deployment; its failure fails the pipeline."""
    config: PipelineConfig = parameters["config"]
    queue = queue_of(STAGES[stage], config)
    run_stage(STAGES[stage].command, parameters | {"config": config.model_dump(mode="json")}, queue)


def _side_by_side(calls: Sequence[Callable[[], None]]) -> None:
    """Run the calls in threads that see the parent flow's context; the first failure ends the others."""
    if len(calls) == 1:
        calls[0]()
        return
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(copy_context().run, call) for call in calls]
        try:
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
        except BaseException:
            stop_children()
            raise
