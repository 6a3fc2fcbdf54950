"""The lines of `functa compare`."""

import json
from pathlib import Path

import pytest

from functa.flows.cli.compare import SETTINGS, print_comparison, table
from functa.flows.config.load import load_config
from functa.tasks.report.compare.runs import OTHER_IMAGES, ComparedRun, compare_runs

METRICS = {"psnr_test": 30.0, "mae_255": 5.0, "ece": 0.2, "psnr_images": {"by_step": {"test": 300}}}


def printed(capsys: pytest.CaptureFixture[str], images: tuple[str, str], everything: bool = False) -> list[str]:
    """Compare two runs whose headline, one other figure and many settings differ; return the printed lines."""
    runs = tuple(
        ComparedRun(name, "root", "", METRICS | {"psnr_test": psnr, "ece": psnr / 100},
                    {"x": {str(key): psnr for key in range(SETTINGS + 5)}}, {}, digest)
        for name, psnr, digest in (("a", 30.0, images[0]), ("b", 29.0, images[1]))
    )  # fmt: skip
    print_comparison(compare_runs(runs), everything)
    return capsys.readouterr().out.splitlines()


def test_the_headline_comes_first_and_what_is_left_out_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, ("i", "i"))
    assert lines[0].split() == ["Headline", "figures", "that", "differ"]
    assert sum("x." in line for line in lines) == SETTINGS
    assert not [line for line in lines if "calibration" in line or OTHER_IMAGES in line]
    assert lines[-1].startswith("Not shown: 5 settings and 1 other figure that differ, 2 figures that are equal;")
    assert sum("\u2605" in line for line in lines) == 1


def test_all_shows_every_figure_and_setting_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    text = "\n".join(printed(capsys, ("i", "i"), everything=True))
    assert text.count("x.") == SETTINGS + 5
    assert all(name in text for name in ("Expected calibration", "Mean absolute error", "by inner step"))
    assert "by_step" not in text


def test_different_images_are_named_and_no_value_is_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, ("i", "j"))
    assert lines[0] == OTHER_IMAGES
    assert not [line for line in lines if "\u2605" in line]


def test_a_table_of_the_paper_is_filled_in_from_a_runs_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config("cifar10_4x4x64_fast").model_dump(mode="json")
    (tmp_path / "metrics.json").write_text(json.dumps({"psnr_test": 37.68}))
    (tmp_path / "run.json").write_text(json.dumps({"config": config, "created": "2026-11-30"}))
    assert table("2", [str(tmp_path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "39.0 dB" in shown and "37.68 dB" in shown and "-1.32 dB" in shown and shown.count("not measured") == 15
    assert table("2", [str(tmp_path)], as_json=True) == 0
    lines = json.loads(capsys.readouterr().out)
    assert [line["ours"] for line in lines if line["ours"] is not None] == [37.68]
