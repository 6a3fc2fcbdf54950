"""Figures of a sweep: mean and sd, names, splits."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
from tests.helpers.tasks.sweep_members import member

METRICS = {"psnr_test": 20.0, "fd": {"classifier": 3.5, "latent": 9}, "fd_reference": {"images": "train", "count": 5}}


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=6))
def test_mean_and_sd_are_those_of_numpy(values: list[float]) -> None:
    found = summarise([member(value, "1") for value in values], ("fd.latent",))["fd.latent"]
    assert found.mean == pytest.approx(np.mean(values), rel=1e-9, abs=1e-6)
    assert found.sd == pytest.approx(np.std(values, ddof=1), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("psnr_test", ""),
        ("fd.latent", ""),
        ("fd.inception", ""),  # some run may measure it
        ("psnr_by_bit.6", "did you mean psnr_by_bits.6"),
        ("psnr_tset", "did you mean psnr_test"),
        ("zzz", "known: psnr_test"),
    ],
)
def test_a_name_that_no_run_measures_is_refused_with_near_names(metric: str, expected: str) -> None:
    found = unknown_metric(metric)
    assert (found == "") if not expected else (expected in found)


@pytest.mark.parametrize(
    ("metric", "expected"),
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
def test_a_metric_that_no_member_measured_is_refused_with_near_names(metric: str, expected: str) -> None:
    found = unmeasured(metric, [METRICS, {"top1_test": 0.5}])
    assert (found == "") if not expected else (expected in found)


def test_every_number_of_metrics_json_has_a_name() -> None:
    assert names_of(METRICS | {"flag": True, "text": "x"}) == [
        "psnr_test", "fd.classifier", "fd.latent", "fd_reference.count",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("metric", "metrics", "expected"),
    [
        ("top1_test", {}, "chosen on test."),
        ("psnr_by_bits.6", {}, "chosen on test."),
        ("ece", {}, "chosen on test."),
        ("psnr_train", {}, "not chosen on test"),
        ("fd.classifier", METRICS, "not chosen on test"),
        ("fid", {"fd_reference": {"images": "test"}}, "chosen on test."),
        ("locality", {}, "not known"),
    ],
)
def test_the_split_that_a_choice_would_be_made_on_is_named(metric: str, metrics: dict[str, Any], expected: str) -> None:
    text = split_of(metric, metrics)
    assert expected in text
    assert ("is chosen on test" in text) == (expected == "chosen on test.")


def test_a_split_is_that_of_a_member_that_has_the_figure() -> None:
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
