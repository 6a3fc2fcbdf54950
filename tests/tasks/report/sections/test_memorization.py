"""Memorisation in the report."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from functa.tasks.report.blocks import ReportData
from tests.helpers.tasks.report_page import Page, digit_pictures, page_of


def memorization(full: ReportData, conditional: bool) -> ReportData:
    """Add two samples, one of which repeats, and their nearest training images."""
    images = digit_pictures()[0]
    table: dict[str, Any] = {"label": [0, 1, -1], "images": [5, 5, 10], "draws": [5, 5, 10], "distinct": [3, 3, 6],
                             "expected": [3.4, 3.4, 6.5], "sd": [0.8, 0.8, 1.1]}  # fmt: skip
    arrays = {
        "samples": images[:2], "nearest": np.stack([images[2:4]] * 3), "distances": np.ones((3, 2)),
        "labels": np.array([0, 1]), "repeating": np.array([False, True]), "same": np.zeros(4, bool),
        "isolation": np.linspace(0.5, 1, 8), "isolation_unseen": np.linspace(0.4, 1, 8),
    }  # fmt: skip
    arrays |= {f"table_{name}": np.array(column) for name, column in table.items()}
    config = full.config | {"diffusion": {"process": {"conditional": conditional}}}
    return dataclasses.replace(full, config=config, classes=["tall", "wide"], arrays={"memorization": arrays})


@pytest.mark.parametrize("conditional", [True, False])
def test_only_samples_that_were_drawn_for_a_class_are_named_by_it(full: ReportData, conditional: bool) -> None:
    page = Page(page_of(dataclasses.replace(memorization(full, conditional), samples=None)))
    captions = [line for line in page.attributes("title") if "repeats" in line or line in ("tall", "wide")]
    assert captions == (["tall", "wide, repeats"] if conditional else ["repeats"])
    assert ("class of the nearest" in page.text) is not conditional
