"""Prefect artifacts: tables and small pictures."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from functa.tasks.report import artifacts, pixels


def test_a_figure_that_was_not_measured_has_no_row() -> None:
    assert artifacts.metrics_table({"fid": None, "psnr_test": 1.0, "fd": {}}) == artifacts.metrics_table(
        {"psnr_test": 1.0}
    )


def pictures(markdown: str) -> list[Image.Image]:
    found = re.findall(r"!\[[^\]]*\]\((data:image/png;base64,[^)]*)\)", markdown)
    assert all(len(uri) < 60_000 for uri in found)
    return [Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) for uri in found]


@pytest.mark.parametrize(("side", "channels"), [(8, 1), (28, 1), (32, 3), (64, 3), (256, 3)])
def test_artifact_pictures_are_small_enough_to_store_and_large_enough_to_see(side: int, channels: int) -> None:
    noise = np.random.default_rng(0).integers(
        0, 256, (16, side, side, channels), dtype=np.uint8
    )  # the worst to compress
    shown = pictures(artifacts.reconstruction_markdown(noise, noise[::-1], np.zeros(16)))
    shown += pictures(artifacts.samples_markdown(noise, ["a"] * 16))
    assert len(shown) == 2 * 3 + 2
    for picture in shown:
        assert picture.height >= 32 and picture.width >= 8 * 32


def test_artifacts_enlarge_digits_without_smoothing(digits: tuple[pixels.Pixels, pixels.Pixels]) -> None:
    originals, reconstructions = digits
    picture = pictures(artifacts.reconstruction_markdown(originals, reconstructions, np.zeros(10)))[0]
    assert picture.height == 64
    np.testing.assert_array_equal(np.asarray(picture)[::8, :64:8], originals[0, :, :, 0])


@pytest.mark.attacks
def test_class_names_in_markdown_do_nothing(digits: tuple[pixels.Pixels, pixels.Pixels]) -> None:
    names = [
        "![x](http://evil.example/a.png)",
        "<script>",
        "a\n# b",
        "www.evil.example",
        "[a](b)",
        "`x`|*y*_z_",
        "\u202eabc",
    ]
    line = artifacts.samples_markdown(digits[0][: len(names)], names).splitlines()[-1]
    assert line.startswith("Classes, from left to right: ")
    rest = re.sub(r"&#\d+;", "", line)
    assert re.fullmatch(r"[\w ,:·]*", rest), rest
    assert "://" not in line and "www.evil" not in line


def test_artifacts_without_pictures_report_it() -> None:
    none = np.zeros((0, 8, 8, 1), np.uint8)
    assert "No pictures" in artifacts.reconstruction_markdown(none, none, [])
    assert "No samples" in artifacts.samples_markdown(none)


def test_cells_keep_plain_words_and_escape_what_markdown_would_take_for_more() -> None:
    plain = {
        "figure": "PSNR, test",
        "value": "32.99 dB",
        "path": "each image's Fréchet distance (1 of 2): 50%",
        "count": 3,
    }
    assert artifacts.cells([plain]) == [plain]
    for text in (
        "[a](b)",
        "http://x.example",
        "www.x.example",
        "<b>",
        "_a_",
        "- a",
        "1. a",
        "# a",
        "a\n\nb",
        "a|b",
        "",
    ):
        assert artifacts.cells([{"x": text}])[0]["x"] == artifacts.markdown(text)
