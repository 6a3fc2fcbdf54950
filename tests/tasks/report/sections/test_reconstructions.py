"""Reconstructions in the report."""

import dataclasses

import numpy as np

from functa.tasks.report.blocks import ReportData
from tests.helpers.tasks.report_page import files_of, page_of


def test_equal_pictures_have_infinite_psnr(full: ReportData) -> None:
    assert "∞" in page_of(dataclasses.replace(full, reconstructions=full.originals))


def test_with_few_test_images_no_sheet_repeats_another(full: ReportData) -> None:
    assert full.originals is not None and full.reconstructions is not None
    originals, images = full.originals, full.reconstructions
    kept = {
        f"{kind}_{name}": array[:4]
        for kind in ("best", "worst")
        for name, array in (("originals", originals), ("reconstructions", images), ("psnr", np.arange(10.0)))
    }
    data = dataclasses.replace(full, arrays={"reconstruction": kept})
    every, best, worst = (f"reconstructions{name}.png" for name in ("", "_best", "_worst"))
    for count, expected in ((10, {every}), (7, {every}), (300, {every, best, worst})):
        measured = dataclasses.replace(data, psnr_per_image=np.full(count, 30.0))
        assert {name for name in files_of(measured) if name.startswith("reconstructions")} == expected
    some = dataclasses.replace(
        data, originals=originals[:3], reconstructions=images[:3], psnr_per_image=np.full(6, 30.0)
    )
    assert {name for name in files_of(some) if name.startswith("reconstructions")} == {every, worst}
