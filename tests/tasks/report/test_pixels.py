"""Pictures as bytes."""

import numpy as np
import pytest

from functa.tasks.report import pixels


def test_errors_are_amplified_as_far_as_almost_none_is_clipped() -> None:
    black = np.zeros((1, 8, 8, 1), np.uint8)
    for error, factor in ((0, 32), (7, 32), (8, 16), (60, 4), (127, 2), (255, 1)):
        assert pixels.amplification(black, black + np.uint8(error)) == factor
    np.testing.assert_array_equal(pixels.errors(black + np.uint8(200), black, 4), 255)


def test_psnr_of_pictures_is_the_closed_form() -> None:
    black = np.zeros((1, 4, 4, 3), np.uint8)
    np.testing.assert_allclose(pixels.psnr(black, black + np.uint8(51)), -20 * np.log10(0.2))


@pytest.mark.parametrize(
    ("shape", "least", "most", "got"),
    [
        ((8, 8), 64, 64, (64, 64)),
        ((28, 20), 64, 256, (84, 60)),
        ((300, 200), 64, 150, (150, 100)),
        ((65, 65), 64, 64, (64, 64)),
    ],
)
def test_pictures_are_fitted_whole(shape: tuple[int, int], least: int, most: int, got: tuple[int, int]) -> None:
    assert pixels.fit(np.zeros((*shape, 3), np.uint8), least, most).shape == (*got, 3)


def test_pictures_of_other_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        pixels.png(np.zeros((4, 4, 2), np.uint8))
    with pytest.raises(ValueError, match="differ in shape"):
        pixels.psnr(np.zeros((1, 4, 4, 1), np.uint8), np.zeros((2, 4, 4, 1), np.uint8))
