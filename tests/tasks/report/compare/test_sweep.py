"""Figures of a sweep and of a comparison: mean and sd, names, splits, the gate's verdicts, charts."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from functa.storage.places.address import open_location
from functa.tasks.evaluation.gate import verdicts
from functa.tasks.report.blocks import Drawing, Section, Sheet
from functa.tasks.report.compare.runs_page import overlaid
from functa.tasks.report.compare.sweep import (
    Sweep,
    SweepMember,
    best,
    names_of,
    split_of,
    splits,
    summarise,
    unknown_metric,
    unmeasured,
)
from functa.tasks.report.compare.sweep_page import over_axes, sweep_sections, table, write_sweep
from functa.tasks.report.page import shown_section

METRICS = {"psnr_test": 20.0, "fd": {"classifier": 3.5, "latent": 9}, "fd_reference": {"images": "train", "count": 5}}


def member(value: float, *values: str, seed: int = 0, state: str = "finished") -> SweepMember:
    metrics = {} if state == "failed" else {"fd": {"latent": value}}
    return SweepMember("name", values, seed, "root", state, "broke" if state == "failed" else "", metrics)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=6))
def test_mean_and_sd_are_those_of_numpy(values: list[float]) -> None:
    found = summarise([member(value, "1") for value in values], ("fd.latent",))["fd.latent"]
    assert found.mean == pytest.approx(np.mean(values), rel=1e-9, abs=1e-6)
    assert found.sd == pytest.approx(np.std(values, ddof=1), rel=1e-6, abs=1e-6)


def test_one_value_has_no_sd_and_what_failed_has_no_part_in_a_mean() -> None:
    sweep = Sweep("p", ("k",), ("fd.latent",), (member(4, "1"), member(0, "1", seed=1, state="failed"), member(6, "2")))
    columns, rows = table(sweep)
    assert columns == ("k", "seeds", "fd.latent", "fd.latent sd")
    assert rows == [("1", "1 of 2", 4.0, None), ("2", 1, 6.0, None)]


def test_seeds_are_counted_by_figure_where_the_figures_have_different_ones() -> None:
    members = [
        SweepMember("n", ("1",), seed, "", "finished", "", {"psnr_test": 2.0} | ({"ece": 0.5} if seed else {}))
        for seed in range(3)
    ]
    _, (row,) = table(Sweep("p", ("k",), ("psnr_test", "ece"), tuple(members)))
    assert row == ("1", "psnr_test 3 of 3, ece 2 of 3", 2.0, 0.0, 0.5, 0.0)


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        ("psnr_test", ""),
        ("fd.latent", ""),
        ("fd.inception", ""),  # some run may measure it
        ("psnr_by_bit.6", "did you mean psnr_by_bits.6"),
        ("psnr_tset", "did you mean psnr_test"),
        ("zzz", "known: psnr_test"),
    ],
)
def test_a_name_that_fits_no_runs_figure_is_told_with_near_names(metric: str, said: str) -> None:
    found = unknown_metric(metric)
    assert (found == "") if not said else (said in found)


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        ("psnr_test", ""),
        ("fd.latent", ""),
        ("top1_test", ""),
        ("fd.latnt", "did you mean fd.latent"),
        ("fd", "did you mean fd.classifier or fd.latent?"),
        ("fd_reference.images", "did you mean fd_reference.count"),
        ("kd.classifier", "their config asks for none; name a figure of a member's metrics.json"),
    ],
)
def test_a_metric_that_no_member_measured_is_told_with_near_names(metric: str, said: str) -> None:
    found = unmeasured(metric, [METRICS, {"top1_test": 0.5}])
    assert (found == "") if not said else (said in found)


def test_every_number_of_metrics_json_has_a_name() -> None:
    assert names_of(METRICS | {"flag": True, "text": "x"}) == [
        "psnr_test", "fd.classifier", "fd.latent", "fd_reference.count",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("metric", "metrics", "said"),
    [
        ("top1_test", {}, "chosen on test."),
        ("psnr_by_bits.6", {}, "chosen on test."),
        ("ece", {}, "chosen on test."),
        ("psnr_train", {}, "not chosen on test"),
        ("fd.classifier", METRICS, "not chosen on test"),
        ("fid", {"fd_reference": {"images": "test"}}, "chosen on test."),
        ("locality", {}, "does not tell"),
    ],
)
def test_the_split_that_a_choice_would_be_made_on_is_told(metric: str, metrics: dict[str, Any], said: str) -> None:
    told = split_of(metric, metrics)
    assert said in told
    assert ("is chosen on test" in told) == (said == "chosen on test.")


def test_a_split_is_told_by_a_member_that_has_the_figure() -> None:
    first = SweepMember("n", ("1",), 0, "", "finished", "", {"psnr_test": 1.0})
    second = SweepMember("n", ("2",), 0, "", "finished", "", {"fid": 1.0, "fd_reference": {"images": "test"}})
    assert "chosen on test." in splits(Sweep("p", ("k",), ("fid",), (first, second)))["fid"]


def test_the_best_setting_is_the_smallest_distance_and_the_largest_psnr() -> None:
    settings = Sweep("p", ("k",), ("fd.latent",), (member(4, "1"), member(2, "2"), member(3, "3"))).settings
    found = best(settings, "fd.latent")
    assert found is not None
    assert found.values == ("2",)
    psnr = [
        SweepMember("n", (str(v),), 0, "", "finished", "", {"psnr_test": v, "odd": v}) for v in (3.0, 5.0, math.inf)
    ]
    settings = Sweep("p", ("k",), ("psnr_test", "odd"), tuple(psnr)).settings
    found = best(settings, "psnr_test")
    assert found is not None
    assert found.values == ("5.0",)
    equal = Sweep("p", ("k",), ("fd.latent",), (member(4, "1"), member(4, "2"))).settings
    assert best(equal, "fd.latent") is None
    assert best(settings, "odd") is None  # which end of it is better, nobody knows


def number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


@pytest.mark.parametrize(
    ("axes", "values"),
    [
        (("k",), [("1",), ("2",), ("100",)]),
        (("k",), [("scalar",), ("<b>&",)]),
        (("k", "gamma"), [("scalar", "1"), ("scalar", "2"), ("vector", "1"), ("vector", "2")]),
        (("a", "b", "c"), [("1", "x", "3"), ("2", "y", "3")]),
    ],
)
def test_a_sweep_is_drawn_over_words_and_numbers(axes: tuple[str, ...], values: list[tuple[str, ...]]) -> None:
    members = tuple(member(float(n + seed), *each, seed=seed) for n, each in enumerate(values) for seed in (0, 1))
    sweep = Sweep("p", axes, ("fd.latent",), members, seeded="seed")
    svg = over_axes(sweep.settings, axes, "fd.latent", number)
    assert svg is not None
    assert svg.decode().count("<svg") == 1
    assert "<b>&" not in svg.decode()
    assert over_axes(sweep.settings, axes, "psnr_test", number) is None
    sections = sweep_sections(sweep, number, lambda run: {})
    assert [section.anchor for section in sections] == ["results", "members"]


def test_two_keys_are_a_line_for_each_value_of_the_one_over_the_numbers_of_the_other() -> None:
    values = [(kind, gamma) for kind in ("scalar", "vector") for gamma in ("1", "2", "3")]
    sweep = Sweep("p", ("kind", "gamma"), ("fd.latent",), tuple(member(n, *each) for n, each in enumerate(values)))
    svg = over_axes(sweep.settings, sweep.axes, "fd.latent", number)
    assert svg is not None
    assert all(f">{word}<" in svg.decode() for word in ("scalar", "vector", "gamma", "kind", "3"))


def test_samples_of_each_setting_stand_in_a_row_of_their_own() -> None:
    members = tuple(
        SweepMember("n", (value,), 0, "", "finished", "", {"fid": 1.0}, run=f"run{value}") for value in ("0", "5")
    )
    pictures = {"run0": np.zeros((3, 4, 4, 1), np.uint8), "run5": np.full((3, 4, 4, 1), 9, np.uint8)}
    sections = sweep_sections(
        Sweep("p", ("d.guidance",), ("fid",), members), number, lambda run: {"samples": pictures[run]}
    )
    sheet = next(section for section in sections if section.anchor == "samples").blocks[0]
    assert [row.label for row in sheet.rows] == ["guidance 0", "guidance 5"]  # type: ignore[union-attr]
    assert [int(row.images.max()) for row in sheet.rows] == [0, 9]  # type: ignore[union-attr]


def spread_sheet(side: int) -> Sheet:
    members = tuple(SweepMember("n", (value,), 0, "", "finished", "", {}, run=value) for value in "ab")
    pictures = np.arange(16, dtype=np.uint8)[:, None, None, None].repeat(side, 1).repeat(side, 2)
    sections = sweep_sections(Sweep("p", ("k",), ("fid",), members), number, lambda run: {"samples": pictures})
    (sheet,) = next(section for section in sections if section.anchor == "samples").blocks
    assert isinstance(sheet, Sheet)
    return sheet


def test_the_samples_shown_are_spread_over_all_and_so_over_the_classes() -> None:
    for row in spread_sheet(4).rows:
        shown = row.images[:, 0, 0, 0].astype(int)
        assert (len(shown), shown[0], shown[-1]) == (8, 0, 15)
        assert set(np.diff(shown)) <= {2, 3}
    assert "even steps through all" in spread_sheet(4).note


def test_large_samples_stand_two_beside_each_other_on_a_phone() -> None:
    assert [strip.columns for strip in shown_section(Section("s", "", "", (spread_sheet(256),))).sheets[0][2]] == [
        2
    ] * 4


def best_told(members: tuple[SweepMember, ...]) -> str:
    blocks = sweep_sections(Sweep("p", ("k",), ("fd.latent",), members, "seed"), number, lambda run: {})[0].blocks
    return next(block.note for block in blocks if isinstance(block, Drawing))


def test_the_best_setting_is_told_with_what_of_it_is_missing() -> None:
    others = (member(5, "2"), member(6, "2", seed=1))
    lucky = (member(4, "1"), member(0, "1", seed=1, state="failed"))
    assert best_told((*others, *lucky)).startswith("Best: 4, at k 1, measured with 1 of its 2 seeds. Mean and sd")
    whole = (member(4, "1"), member(4, "1", seed=1))
    assert best_told((*others, *whole)).startswith("Best: 4 \u00b1 0, at k 1. Mean and sd")
    gone = (member(0, "3", state="failed"), member(0, "3", seed=1, state="failed"))
    assert best_told((*others, *whole, *gone)).startswith("Best: 4 \u00b1 0, at k 1. Not measured: 1 of 3 settings.")


def test_charts_of_metrics_that_were_asked_for_earlier_are_removed(tmp_path: Path) -> None:
    both = {"psnr_test": 1.0, "ece": 2.0}
    members = tuple(
        SweepMember("n", (value,), 0, "", "finished", "", {key: figure * float(value) for key, figure in both.items()})
        for value in "12"
    )
    for metrics in (tuple(both), ("ece",)):
        write_sweep(Sweep("p", ("k",), metrics, members), open_location(str(tmp_path)), number, lambda run: {})
        (tmp_path / "images/mine.png").write_bytes(b"kept")
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [
        "members.csv", "mine.png", "sweep.csv", "sweep_ece.svg",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("gate", "metrics", "told"),
    [
        ({"min_psnr": 25}, {"psnr_test": 21.3}, ["psnr_test 21.3 dB is below gate.min_psnr 25 dB"]),
        ({"min_psnr": 25}, {"psnr_test": 25.0}, []),
        ({"min_psnr": 25}, {"psnr_test": 24.99999}, ["psnr_test 24.99999 dB is below gate.min_psnr 25 dB"]),
        ({"max_fd": 2}, {"fd": {"classifier": 2.5}}, ["fd.classifier 2.5 is above gate.max_fd 2"]),
        ({"max_fd": 2}, {"fd": {"latent": 1}}, ["fd.classifier was not measured, but gate.max_fd 2 asks for it"]),
        ({"max_fid": 9}, {}, ["fid was not measured, but gate.max_fid 9 asks for it"]),
        (
            {"min_top1": 0.5},
            {"top1_test": math.nan},
            ["top1_test nan is no number, but gate.min_top1 0.5 asks for it"],
        ),
        ({"min_top1": 0.5, "max_ece": 0.1}, {"top1_test": 0.6, "ece": 0.2}, ["ece 0.2 is above gate.max_ece 0.1"]),
        ({"min_psnr": None}, {}, []),
        ({}, {}, []),
    ],
)
def test_the_gate_names_figure_and_threshold(gate: dict[str, Any], metrics: dict[str, Any], told: list[str]) -> None:
    assert [verdict.told() for verdict in verdicts(gate, metrics) if not verdict.passed] == told


def test_curves_of_runs_lie_over_each_other_and_every_run_is_named() -> None:
    rows = [{"step": step, "loss": 1 / step, "psnr": step} for step in range(1, 60)]
    svg = overlaid({"one": rows, "two": rows[:30], "none": [{"step": 1}]})
    assert svg is not None
    assert all(svg.decode().count(f">{name}<") == 1 for name in ("one", "two"))
    assert overlaid({"none": [{"step": 1}]}) is None
