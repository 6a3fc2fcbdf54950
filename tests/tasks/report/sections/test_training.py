"""Training curves in the report."""

import json
from pathlib import Path

from functa.flows.config.load import load_config
from functa.tasks.report.blocks import ReportData
from functa.tasks.report.sections.training import LAST, curves, section
from functa.tasks.training.classifier import ClassifierJob, run
from tests.helpers.storage.functasets import filled


def test_a_resumed_run_draws_each_step_once() -> None:
    rows = [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 1.0}]
    assert curves(rows) == curves([rows[0], rows[2], rows[3]])


def test_every_figure_at_the_end_is_one_that_the_training_writes(tmp_path: Path) -> None:
    """The keys are compared with rows that a real training logged."""
    filled(str(tmp_path / "z"))
    settings = ("steps=2", "warmup=0", "batch=6", "log_every=1", "model.width=16", "model.depth=1", "model.heads=2")
    config = load_config("digits", [f"classifier.{setting}" for setting in settings]).classifier
    assert config is not None
    job = ClassifierJob(
        seed=0, classifier=config, functaset=str(tmp_path / "z"), classes=10, device="cpu",
        output=str(tmp_path / "classifier"), digest="d",
    )  # fmt: skip
    run(job, lambda row: None)
    rows = [json.loads(line) for line in (tmp_path / "classifier/metrics.jsonl").read_text().splitlines()]
    assert {key for key, _, _ in LAST} - rows[-1].keys() == {"psnr"}  # the field's alone
    found = section(ReportData("run", curves={"train_classifier": rows}))
    assert found is not None
    (drawing,) = found.blocks
    for expected in ("2 steps", "loss", "accuracy", "learning rate", "images/s"):
        assert expected in drawing.note, expected
