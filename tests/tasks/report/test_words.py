"""Figures in words."""

from typing import Any

import pytest

from functa.tasks.report import artifacts, words
from functa.tasks.report.blocks import ReportData
from tests.helpers.tasks.report_page import METRICS, Page, page_of


def leaves(value: Any, path: str = "") -> list[str]:
    if isinstance(value, dict):
        return [leaf for key, below in value.items() for leaf in leaves(below, f"{path}.{key}" if path else key)]
    return [path]


def test_metrics_show_everything_in_metrics_json(full: ReportData) -> None:
    shown = words.figures(METRICS)
    assert sorted(figure.key for figure in shown) == sorted(leaves(METRICS))
    assert len({figure.name for figure in shown}) == len(shown)
    rows = artifacts.metrics_table(METRICS)
    assert len(rows) == len(shown) and all(set(row) == {"metric", "value", "meaning"} for row in rows)
    assert {"metric": "PSNR, test", "value": "30.84 dB"}.items() <= rows[0].items()
    page = Page(page_of(full))
    assert all(figure.name in page.text and figure.value in page.text for figure in shown)


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (0.9733, "share", "97.3 %"), (1.0, "share", "100.0 %"), (0.99987, "share", "100 %"), (1797, "count", "1,797"),
        (61.3, "duration", "1 min 1 s"), (3725, "duration", "1 h 2 min"), (9.96, "duration", "10.0 s"),
        (59.7, "duration", "1 min 0 s"), (0.01234567, "plain", "0.01235"), (float("nan"), "dB", "not a number"),
        (float("inf"), "dB", "∞"), (5123.4, "rate", "5,123 images/s"), ("zstd", "dB", "zstd"), (True, "plain", "true"),
    ],
)  # fmt: skip
def test_values_are_written_for_people(value: Any, unit: str, expected: str) -> None:
    assert words.show(value, unit) == expected


def test_accuracies_of_many_classes_are_left_to_their_own_table() -> None:
    few, many = ({str(n): 0.5 for n in range(count)} for count in (20, 21))
    assert len(words.figures({"accuracy_by_class": few})) == 20
    assert words.figures({"accuracy_by_class": many}) == []
