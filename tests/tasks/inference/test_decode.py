"""Train, store and decode fields of every interpolation; a resolution that cannot be decoded is refused."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from functa.storage.errors import StorageError
from functa.storage.functaset.functaset import Functaset
from functa.tasks.inference import decode
from functa.tasks.inference.decode import decode_rows
from tests.helpers.tasks.encoded import encoded


def functaset(folder: Path, *overrides: str) -> str:
    """Make a functaset of digits under a field of a few training steps."""
    return encoded(folder, *overrides)[1].functaset


def decoded(uri: str, resolution: int | None, out: Path) -> np.ndarray:
    assert decode_rows(uri, "test", (0, 4), resolution, out) == 4
    return np.stack([np.asarray(Image.open(path)) for path in sorted(out.glob("*.png"))]).astype(int)


BILINEAR = "field.interpolation=bilinear"


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["field.kernel=3"], marks=pytest.mark.slow),
        pytest.param([BILINEAR, "field.coordinates=patch"], marks=pytest.mark.slow),
        [BILINEAR, "field.coordinates=global", "field.kernel=3", "inner.rates=element"],
    ],
    ids=str,
)
def test_a_larger_image_contains_the_pixels_of_the_stored_resolution(overrides: list[str], tmp_path: Path) -> None:
    """At three times the resolution every third pixel was fitted."""
    uri = functaset(tmp_path, *overrides)
    coarse, fine = decoded(uri, None, tmp_path / "coarse"), decoded(uri, 24, tmp_path / "fine")
    assert coarse.shape == (4, 8, 8)
    assert np.abs(fine[:, 1::3, 1::3] - coarse).max() <= 1  # rounding to uint8


def test_binary_coordinates_are_decoded_only_at_their_own_resolution(tmp_path: Path) -> None:
    uri = functaset(tmp_path, BILINEAR)
    assert decoded(uri, 8, tmp_path / "own").shape == (4, 8, 8)
    with pytest.raises(StorageError, match="resolution 16: a field of binary coordinates exists at the resolution"):
        decode_rows(uri, "test", (0, 4), 16, tmp_path / "other")


def test_by_default_the_first_rows_are_decoded_as_many_as_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = functaset(tmp_path, BILINEAR)
    present = Functaset.open(uri).rows("test")
    assert decode_rows(uri, "test", None, None, tmp_path / "first") == min(16, present)
    monkeypatch.setattr(decode, "FIRST_ROWS", present + 1)
    assert decode_rows(uri, "test", None, None, tmp_path / "all") == present
    with pytest.raises(StorageError, match=f"has {present} rows, 0:{present + 1} is beyond them"):
        decode_rows(uri, "test", (0, present + 1), None, tmp_path / "beyond")
