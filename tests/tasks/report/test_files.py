"""The files of a report."""

import io
import re

import pytest
from PIL import Image

from functa.tasks.report.blocks import ReportData
from tests.helpers.tasks.report_page import files_of, hostile


def test_every_picture_is_a_file_of_the_run(full: ReportData) -> None:
    drawn = files_of(full)
    assert set(drawn) == {"curves_meta_train.svg", "curves_train_classifier.svg", "psnr_histogram.svg",
                          "psnr_by_bits.svg", "reconstructions.png", "samples.png"}  # fmt: skip
    for name, content in drawn.items():
        if name.endswith(".png"):
            Image.open(io.BytesIO(content)).verify()
        else:
            assert b"</svg>" in content and b"<metadata>" not in content
    assert files_of(full) == drawn  # equal data, equal bytes


@pytest.mark.attacks
def test_file_names_and_captions_of_hostile_names_are_harmless(full: ReportData) -> None:
    names = files_of(hostile(full))
    assert all(re.fullmatch(r"\w+\.(svg|png)", name) for name in names)


def test_charts_leave_pyplot_and_its_settings_alone(full: ReportData) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    files_of(full)
    assert dict(matplotlib.rcParams) == before
