"""The page of a sweep: table, charts, samples."""

from pathlib import Path

import numpy as np
import pytest

from functa.storage.places.address import open_location
from functa.tasks.report.blocks import Drawing, Sheet
from functa.tasks.report.compare.sweep import (
    Sweep,
    SweepMember,
)
from functa.tasks.report.compare.sweep_page import over_axes, sweep_sections, table, write_sweep
from tests.helpers.tasks.sweep_members import member, number


def test_one_value_has_no_sd_and_failed_members_do_not_count_in_a_mean() -> None:
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


def test_samples_of_each_setting_have_a_row_of_their_own() -> None:
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
    assert "evenly spaced" in spread_sheet(4).note


def best_note(members: tuple[SweepMember, ...]) -> str:
    blocks = sweep_sections(Sweep("p", ("k",), ("fd.latent",), members, "seed"), number, lambda run: {})[0].blocks
    return next(block.note for block in blocks if isinstance(block, Drawing))


def test_the_best_setting_is_named_with_its_missing_measurements() -> None:
    others = (member(5, "2"), member(6, "2", seed=1))
    lucky = (member(4, "1"), member(0, "1", seed=1, state="failed"))
    assert best_note((*others, *lucky)).startswith("Best: 4, at k 1, measured with 1 of its 2 seeds. Mean and sd")
    whole = (member(4, "1"), member(4, "1", seed=1))
    assert best_note((*others, *whole)).startswith("Best: 4 \u00b1 0, at k 1. Mean and sd")
    failed = (member(0, "3", state="failed"), member(0, "3", seed=1, state="failed"))
    assert best_note((*others, *whole, *failed)).startswith("Best: 4 \u00b1 0, at k 1. Not measured: 1 of 3 settings.")


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
