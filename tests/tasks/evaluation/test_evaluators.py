"""The table of evaluators: an entry is all that a new one needs, and the config can leave each out."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from functa.flows.config.digests import chain_digests
from functa.flows.config.load import load_config
from functa.tasks.evaluation import evaluators
from functa.tasks.evaluation.catalogue import catalogue, groups
from functa.tasks.evaluation.config import SLOW
from functa.tasks.evaluation.evaluator import Described, Evaluator
from functa.tasks.evaluation.evaluator_input import SILENT, EvaluationJob, Messages, all_arrays, write_arrays
from functa.tasks.report.artifacts import metrics_table
from functa.tasks.report.blocks import ReportData, Section, Table
from functa.tasks.report.compare.sweep import unknown_metric
from functa.tasks.report.files import page_files
from functa.tasks.report.page import write_report
from functa.tasks.report.sections import report_sections
from tests.helpers.tasks.evaluated import evaluation_job

BOTH = {"classifier", "diffusion"}


def measure(job: EvaluationJob, messages: Messages) -> dict[str, Any]:
    write_arrays(job.output, "sharpness", edges=np.array([1.0, 3.0]))
    messages.progress("images", 2, 2)
    return {"sharpness": 2.0}


def section(data: ReportData) -> Section | None:
    edges = data.arrays.get("sharpness", {}).get("edges")
    if edges is None:
        return None
    return Section("sharpness", "Sharpness", "", (Table("sharpness", "Edges", ("edge",), ((float(edges.mean()),),)),))


TOY = Evaluator(
    "sharpness", f"{__name__}:measure", (f"{__name__}:section",),
    figures={"sharpness": Described("Pictures", "Sharpness of edges", "plain", "Mean step at edges.", "higher")},
)  # fmt: skip


def test_one_entry_adds_an_evaluator_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluators, "EVALUATORS", (*evaluators.EVALUATORS, TOY))
    job = evaluation_job(tmp_path)
    assert TOY in evaluators.chosen(job.evaluation, set())
    metrics = evaluators.find("sharpness").run(job, SILENT)
    assert catalogue()["sharpness"].meaning == "Mean step at edges." and "Pictures" in groups()
    assert unknown_metric("sharpness") == ""
    (row,) = metrics_table(metrics)
    assert row == {
        "metric": "Sharpness of edges", "value": "2", "meaning": "Mean step at edges. Higher is better.",
    }  # fmt: skip
    data = ReportData("toy", metrics=metrics, arrays=all_arrays(job.output))
    sections = report_sections(data)
    assert page_files(sections) == {"sharpness.csv": b"edge\n2.0\n"}
    page = write_report(data, sections)
    assert 'href="#sharpness"' in page and "Sharpness of edges" in page


def test_every_entry_of_the_table_names_functions_that_exist() -> None:
    from functa.tasks.evaluation.evaluator import _imported

    for evaluator in evaluators.EVALUATORS:
        assert all(callable(_imported(name)) for name in (evaluator.measure, *evaluator.sections)), evaluator.name


def names(*settings: str, models: set[str] = BOTH) -> set[str]:
    config = load_config("digits", list(settings))
    return {evaluator.name for evaluator in evaluators.chosen(config.evaluation, models)}


@pytest.mark.parametrize(
    "part", ["reconstruction", "compression", "perturbation", "classification", "generation", "memorization"]
)
def test_each_part_can_be_left_out(part: str) -> None:
    assert names() - names(f"evaluation.{part}=null") == {part}


def test_quick_leaves_out_the_slow_parts_and_only_these() -> None:
    assert names() - names("evaluation.quick=true") == set(SLOW)
    quick = load_config("digits", ["evaluation.quick=true"])
    by_hand = load_config("digits", [f"evaluation.{part}=null" for part in SLOW])
    assert chain_digests(quick) == chain_digests(by_hand) != chain_digests(load_config("digits"))


def test_evaluators_run_side_by_side_and_one_that_reads_anothers_arrays_after_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from functa.flows import stages

    reader = Evaluator("reader", f"{__name__}:measure", needs=("reconstruction",))
    monkeypatch.setattr(evaluators, "EVALUATORS", (reader, *evaluators.EVALUATORS, TOY))
    config = load_config("digits")
    chosen = evaluators.chosen(config.evaluation, set())
    assert [each.name for each in chosen] == ["reader", "reconstruction", "compression", "perturbation", "sharpness"]
    waves: list[list[str]] = []

    def fan_out(unit: Any, each: list[dict[str, Any]], dispatch: Any) -> list[dict[str, Any]]:
        waves.append([one["name"] for one in each])
        return [{one["name"]: len(waves)} for one in each]

    monkeypatch.setattr(stages, "fan_out", fan_out)
    ledger: Any = SimpleNamespace(config=config)
    figures = stages._run_evaluators(ledger, evaluation_job(tmp_path), chosen)
    assert waves == [["reconstruction", "compression", "perturbation", "sharpness"], ["reader"]]
    assert set(figures) == {each.name for each in chosen}
    without = load_config("digits", ["evaluation.reconstruction=null"])
    assert reader not in evaluators.chosen(without.evaluation, set())


def test_an_evaluator_of_a_model_is_left_out_without_the_model() -> None:
    assert names(models=set()) == {"reconstruction", "compression", "perturbation"}
    assert names(models={"diffusion"}) == names() - {"classification"}
