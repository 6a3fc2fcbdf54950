"""The paper's tables beside runs: which row a run belongs to, what is not measured, means over seeds."""

import json
from pathlib import Path
from typing import Any

import pytest

from functa.flows.cli.compare import rows_of
from functa.flows.config.load import load_config
from functa.storage.errors import StorageError
from functa.tasks.report.blocks import ReportData
from functa.tasks.report.compare.paper import lines_of, members
from functa.tasks.report.compare.runs import ComparedRun
from functa.tasks.report.sections.figures import beside_the_paper


def run(preset: str, metrics: dict[str, Any], *settings: str) -> ComparedRun:
    config = load_config(preset, [*settings]).model_dump(mode="json")
    return ComparedRun(preset, f"/runs/{preset}", "", metrics, config, {})


def test_rows_are_those_of_the_papers_tables() -> None:
    assert [row.latent[2] for row in rows_of("1")] == [256, 512, 1024]
    assert [row.name for row in rows_of("2")] == [
        "8x8x16, nearest", "8x8x16, bilinear", "4x4x64, nearest", "4x4x64, bilinear"
    ]  # fmt: skip
    third = rows_of("3")
    assert len(third) == 10 and third[-1].name == "32x32x64, nearest, 3x3"
    assert "top1" not in third[-1].figures and third[-1].figures["fid_cond"] == 8.5


def test_a_run_is_set_beside_the_row_of_its_latent_whatever_its_preset() -> None:
    fast = run("cifar10_8x8x16_fast", {"psnr_test": 36.83, "top1_test": 0.84, "top1_best": 0.85})
    drawn = run("paper_cifar10_8x8x16_cond", {"fd": {"wavelet": 2.5, "latent": 1.0}})
    lines = {(line.row, line.key, line.run): line for line in lines_of(rows_of("2"), [fast, drawn])}
    first = "8x8x16, nearest"
    assert lines[first, "psnr", fast.name].cells == ("37.2 dB", "36.83 dB", "-0.37 dB")
    assert lines[first, "top1", fast.name].cells == ("90.3 %", "85.00 %", "-5.30 %")  # the best step's, as in the paper
    assert lines[first, "fid_cond", ""].cells == ("11.2", "not measured", "")
    assert lines["4x4x64, bilinear", "psnr", ""].cells == ("35.3 dB", "not measured", "")
    public = lines[first, "fd.wavelet", drawn.name]
    assert public.cells == ("", "2.5", "") and public.figure == "Fr\u00e9chet distance, wavelet packets, conditional"
    assert (first, "fd.latent", drawn.name) not in lines


def test_fid_is_that_of_samples_with_labels_or_without() -> None:
    runs = [run(f"paper_cifar10_8x8x16{end}", {"fid": fid}) for end, fid in (("", 16.0), ("_cond", 12.0))]
    found = {line.key: line.ours for line in lines_of(rows_of("2"), runs) if line.row == "8x8x16, nearest"}
    assert (found["fid_uncond"], found["fid_cond"]) == (16.0, 12.0)


def test_a_run_of_another_latent_or_size_is_refused_in_one_line() -> None:
    for other in (run("digits", {}), run("cifar10_8x8x16_fast", {}, "images.resolution=64")):
        with pytest.raises(StorageError, match=r"its latent is in no row of this table; rows: 8x8x16, nearest; "):
            lines_of(rows_of("2"), [other])


def test_table_8_has_means_over_the_seeds_of_each_number_of_bits() -> None:
    preset, bits = "paper_imagenet_32x32x64", "encode.quantization.bits=8"
    runs = [run(preset, {"fid": fid}, bits) for fid in (9.0, 9.4)] + [run(preset, {"fid": 8.5})]
    lines = {line.row: line for line in lines_of(rows_of("8"), runs)}
    eight = lines["32x32x64, nearest, 8 bits"]
    assert eight.cells == ("9.0 \u00b1 0.2", "9.2 \u00b1 0.3", "+0.2") and eight.run == "2 seeds"
    assert lines["32x32x64, nearest, 32 bits"].ours == 8.5
    assert lines["32x32x64, nearest, 6 bits"].cells == ("9.2 \u00b1 0.1", "not measured", "")


def test_of_a_sweeps_root_its_finished_members_are_taken(tmp_path: Path) -> None:
    assert members(str(tmp_path)) == [str(tmp_path)]
    listed = [{"root": f"/sweep/{name}", "state": state} for name, state in (("a", "finished"), ("b", "failed"))]
    (tmp_path / "sweep.json").write_text(json.dumps({"members": listed}))
    assert members(str(tmp_path)) == ["/sweep/a"]


def test_a_report_shows_the_papers_row_only_where_there_is_one() -> None:
    paper = run("paper_cifar10_vector_256", {"psnr_test": 27.0})
    section = beside_the_paper(ReportData("t", config=paper.config, metrics=paper.metrics))
    assert section is not None
    (table,) = section.blocks
    assert table.rows == (  # type: ignore[union-attr]
        ("PSNR, test", "27.6 dB", "27.00 dB", "-0.60 dB"), ("Top-1, test", "66.7 %", "not measured", ""),
        ("FID, unconditional", "78.2", "not measured", ""),
    )  # fmt: skip
    assert beside_the_paper(ReportData("t", config=run("digits", {}).config)) is None
