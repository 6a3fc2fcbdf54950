"""Run the pipeline from Python, prepared as the command prepares it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from functa.flows.config.load import load_config
from functa.flows.config.schema import PipelineConfig
from functa.flows.gate import check_gate
from functa.flows.ledger import Ledger


def run(
    config: PipelineConfig | str,
    root: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    from_root: str | Path | None = None,
) -> dict[str, Any]:
    """Run every stage that is not up to date, and return the metrics.

    Args:
        config: What load_config returned, a preset's name or a YAML file's path.
        root: Folder or s3://bucket/prefix that everything is written to; None for ./functa-runs/NAME.
        overrides: KEY=VALUE settings on top of a preset or file, such as "field.width=32".
        from_root: A root whose finished stages are reused where their digests agree.

    The metrics are those of metrics.json: psnr_test in dB, top1_test from 0 to 1, fd and more. Without a Prefect API in
    environment or profile the run starts Prefect's embedded server, without telemetry. Call it below
    `if __name__ == "__main__":`, since training and encoding may start processes.

    Raises, one line each: ConfigError for a config that cannot work, StageConflict where the root holds results of
    another config, GateFailed where a figure is worse than `gate` allows, and StageFailed or StorageError where a
    stage fails.

        metrics = functa.run("digits", "functa-runs/digits", ["field.width=32"])
        print(metrics["psnr_test"])
    """
    if isinstance(config, str):
        config = load_config(config, list(overrides))
    elif overrides:
        raise ValueError("overrides go with a preset or a file: pass them to load_config")
    root = str(root or f"./functa-runs/{config.name}")
    source = None if from_root is None else str(from_root)
    ledger = Ledger(config, root, source)
    if ledger.all_up_to_date():
        check_gate(ledger)
    else:
        _run_pipeline(config, root, source)
    return dict(ledger.require("evaluate").figures)


def _run_pipeline(config: PipelineConfig, root: str, from_root: str | None) -> None:
    from functa.flows.config.preflight import preflight
    from functa.flows.server.session import prefect_session

    preflight(config, root, "pipeline")
    with prefect_session(exit_with_server=False):
        from functa.flows.pipeline import pipeline

        pipeline(root, config=config, from_root=from_root)
