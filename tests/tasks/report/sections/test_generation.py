"""Distances of samples in the report."""

import dataclasses

from functa.tasks.report.blocks import ReportData
from tests.helpers.tasks.report_page import GENERATED, Page, files_of, page_of


def test_the_table_of_feature_spaces_explains_what_is_missing(full: ReportData) -> None:
    page = Page(page_of(dataclasses.replace(full, metrics=GENERATED)))
    for expected in ("No Fr\u00e9chet distance of latents: 100 samples, 128 dimensions are too few for a covariance.",
                 "3 of the samples repeat another one", "pixel-classifier features", "75.0 %"):  # fmt: skip
        assert expected in page.text, expected
    table = files_of(dataclasses.replace(full, metrics=GENERATED))["generation.csv"].decode().splitlines()
    assert table == [
        "Features,pixel-classifier features,latents", "Fr\u00e9chet distance,14,",
        "\u2026 of reconstructions (floor),2,0.1", "\u2026 of noise latents (ceiling),122,9",
        "Kernel distance,-0.001,0.2", "Precision,50.0 %,25.0 %", "Recall,75.0 %,100.0 %", "Dimensions,64,128",
        "Compared one by one,100,100",
    ]  # fmt: skip


def test_floors_probes_and_the_protocol_of_each_space_are_shown(full: ReportData) -> None:
    reference = {"images": "train", "count": 50_000, "samples": 2_000, "test": 1_900}
    reference |= {"dimensions": {"wavelet": 768, "efficientnet_lite0": 1280}}
    metrics = {
        "fd_reference": reference, "fd": {"wavelet": 3.5}, "fd_reconstruction": {"wavelet": 0.5},
        "fd_test": {"wavelet": 1.5}, "fd_noise": {"wavelet": 30.0}, "label_agreement": {"efficientnet_lite0": 0.75},
        "probe_top1": {"efficientnet_lite0": 0.875},
        "fd_protocol": {"wavelet": {"wavelet": "Haar", "level": 1}, "efficientnet_lite0": {"weights": "57" * 32}},
    }  # fmt: skip
    lines = files_of(dataclasses.replace(full, metrics=metrics))["generation.csv"].decode().splitlines()
    assert "\u2026 of test images (floor of unseen images),1.5," in lines
    assert "Label agreement,,75.0 %" in lines and "\u2026 of test images (most it can be),,87.5 %" in lines
    page = Page(page_of(dataclasses.replace(full, metrics=metrics)))
    for expected in (
        "test images 1.5", "1,900 test images show how far images are", "over 4 packets of Haar wavelets, level 1",
        "EfficientNet-Lite0 features: weights sha256 5757575757575757", "never FID",
    ):  # fmt: skip
        assert expected in " ".join(page.text.split()), expected


def test_fid_is_shown_with_its_protocol_and_floor(full: ReportData) -> None:
    reference = {"images": "train", "count": 50_000, "samples": 50_000, "dimensions": {"inception": 2048}}
    protocol = {"weights": "6726825d" + "0" * 56, "resize": "as in TensorFlow 1", "batch": 64}
    metrics = {"fid": 16.5, "fid_reconstruction": 4.2, "fid_protocol": protocol, "fd_reference": reference, "fd": {}}
    page = Page(page_of(dataclasses.replace(full, metrics=metrics)))
    for expected in ("Inception features: FID", "FID: weights sha256 6726825d00000000", "as in TensorFlow 1",
                 "reconstructions (floor) 4.2"):  # fmt: skip
        assert expected in page.text, expected
    other = metrics | {"inception_protocol": protocol, "fd": {"inception": 16.5}}
    del other["fid"], other["fid_protocol"], other["fid_reconstruction"]
    text = Page(page_of(dataclasses.replace(full, metrics=other))).text
    assert "Inception features, not FID: weights sha256 6726825d" in text
    assert "FID" not in text.replace("not FID", "")
