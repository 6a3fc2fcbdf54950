"""Reconstructions in the report."""

import dataclasses

from functa.tasks.report.blocks import ReportData
from tests.helpers.tasks.report_page import page_of


def test_equal_pictures_have_infinite_psnr(full: ReportData) -> None:
    assert "∞" in page_of(dataclasses.replace(full, reconstructions=full.originals))
