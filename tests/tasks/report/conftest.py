"""Data of a report, made once."""

import pytest

from functa.tasks.report.blocks import ReportData
from functa.tasks.report.pixels import Pixels
from tests.helpers.tasks.report_page import digit_pictures, full_data


@pytest.fixture(scope="package")
def full() -> ReportData:
    return full_data()


@pytest.fixture(scope="package")
def digits() -> tuple[Pixels, Pixels]:
    return digit_pictures()
