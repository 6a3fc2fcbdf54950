"""Rate and distortion in the report."""

import pytest

from functa.tasks.report.blocks import ReportData, Table
from functa.tasks.report.sections.compression import psnr_at, section


def test_psnr_at_a_rate_is_linear_in_its_logarithm_and_never_extrapolated() -> None:
    points = [(0.1, 20.0), (1.0, 30.0), (4.0, 36.0)]
    assert psnr_at(points, 10**-0.5) == pytest.approx(25)
    assert psnr_at(points, 2.0) == pytest.approx(33)
    assert psnr_at(points, 4.0) == pytest.approx(36)
    assert psnr_at(points, 0.09) is None and psnr_at(points, 4.1) is None


def test_rate_and_distortion_are_a_plot_and_two_tables() -> None:
    jpeg = {"50": {"bpp": 1.0, "bpp_scan": 0.5, "psnr": 30.0}, "90": {"bpp": 2.0, "bpp_scan": 1.5, "psnr": 36.0}}
    webp = {"50": {"bpp": 1.9, "psnr": 33.0}}
    point = {"bpp": 2**0.5, "bpp_fixed": 1.5, "bpp_with_field": 1.6, "bpp_unamortised": 99.0, "psnr": 31.0}
    metrics = {"compression": {"8": point}, "compression_jpeg": jpeg, "compression_webp": webp}
    shown = section(ReportData(title="", metrics=metrics))
    assert shown is not None and [b.name for b in shown.blocks] == [
        "rate_distortion", "compression", "compression_files",
    ]  # fmt: skip
    ours, files = shown.blocks[1:]
    assert isinstance(ours, Table) and isinstance(files, Table)
    assert ours.rows == (("8", 1.414, 31.0, 33.0, "–", 35.68, 1.5, 1.6, 99.0),)
    assert files.rows[-1] == ("WebP", 50, 1.9, 33.0)
    assert section(ReportData(title="an old run", metrics={"psnr_test": 30.0})) is None
