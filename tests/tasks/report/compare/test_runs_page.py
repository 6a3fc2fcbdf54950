"""The comparison of runs: what differs, headline first, the better value marked, equal figures folded."""

from pathlib import Path
from typing import Any

from functa.tasks.report.blocks import Table
from functa.tasks.report.compare.runs import OTHER_IMAGES, ComparedRun, compare_runs
from functa.tasks.report.compare.runs_page import BEST, overlaid, sections, write_comparison


def test_curves_of_runs_lie_over_each_other_and_every_run_is_named() -> None:
    rows = [{"step": step, "loss": 1 / step, "psnr": step} for step in range(1, 60)]
    svg = overlaid({"one": rows, "two": rows[:30], "none": [{"step": 1}]})
    assert svg is not None
    assert all(svg.decode().count(f">{name}<") == 1 for name in ("one", "two"))
    assert overlaid({"none": [{"step": 1}]}) is None


def compared(*metrics: dict[str, Any]) -> list[Table]:
    """Compare runs of these figures; return the tables of what differs."""
    runs = tuple(
        ComparedRun(f"run{number}", "root", "", each, {"name": "p", "field": {"width": 8 * number}}, {})
        for number, each in enumerate(metrics)
    )
    return [block for block in sections(compare_runs(runs))[0].blocks if isinstance(block, Table)]


def test_the_headline_comes_first_and_the_better_value_is_marked() -> None:
    before = {"rows": 10, "ece": 0.2, "mae_255": 5.0, "psnr_test": 30.0, "fd": {"latent": 2.0}}
    tables = compared(before, before | {"ece": 0.1, "psnr_test": 29.0, "fd": {"latent": 1.0}})
    assert [table.title for table in tables] == [
        "Headline figures", "Config keys that differ", "Classification", "Equal in all runs: 2 figures",
    ]  # fmt: skip
    assert tables[0].rows == (
        ("PSNR, test", f"30.00 dB {BEST}", "29.00 dB"), ("Fr\u00e9chet distance, samples, latents", "2", f"1 {BEST}"),
    )  # fmt: skip
    assert tables[1].rows == (("field.width", "0", "8"),)
    assert tables[2].rows == (("Expected calibration error", "20.0 %", f"10.0 % {BEST}"),)
    assert tables[3].folded and [row[0] for row in tables[3].rows] == ["Mean absolute error", "Rows in the functaset"]


def test_a_figure_without_a_better_end_or_of_one_run_alone_is_not_marked() -> None:
    tables = compared({"rows": 10}, {"rows": 20, "psnr_test": 20.0})
    assert not any(BEST in cell for table in tables for row in table.rows for cell in row)
    assert tables[0].rows == (("PSNR, test", "\u2013", "20.00 dB"),)


def test_a_setting_that_an_older_version_did_not_have_is_no_difference_while_it_is_off() -> None:
    configs = ({"evaluation": {}}, {"evaluation": {"quick": False, "generation": {}}}, {"evaluation": {"quick": True}})
    runs = [ComparedRun("r", "root", "", {}, config, {}) for config in configs]
    assert compare_runs((runs[0], runs[1])).settings == {}
    assert compare_runs((runs[0], runs[2])).settings == {"evaluation.quick": (None, True)}


def test_runs_on_different_images_have_a_warning_and_no_best_value(tmp_path: Path) -> None:
    same, resized = {"images": {"resolution": 8}}, {"images": {"resolution": 16}}
    for digests, configs, comparable in (
        (("a", "a"), (same, same), True),
        (("", "a"), (same, same), True),  # of an older run: not known
        (("a", "b"), (same, same), False),
        (("a", "a"), (same, resized), False),
    ):
        runs = tuple(
            ComparedRun(str(number), "root", "", {"psnr_test": 20.0 + number}, config, {}, digest)
            for number, (digest, config) in enumerate(zip(digests, configs))
        )
        comparison = compare_runs(runs)
        assert comparison.same_images is comparison.as_json()["same_images"] is comparable
        assert any(line.best for line in comparison.lines) is comparable
        write_comparison(comparison, tmp_path / "page.html")
        page = (tmp_path / "page.html").read_text()
        assert (OTHER_IMAGES in page) is not comparable and (BEST in page) is comparable
