"""Image files of every format, changed at random: a picture of the right kind, or BadImage; never more memory."""

import resource
import time
from contextlib import suppress
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from functa.storage.images.files import FORMATS, BadImage, decode, is_colour, read_image
from tests.helpers.fuzzing import examples, mutated
from tests.helpers.storage.image_files import encoded, noise

pytestmark = [pytest.mark.attacks, pytest.mark.fuzz, pytest.mark.filterwarnings("ignore")]

MAX_PIXELS = 100_000
MAX_GROWTH = 200 << 10  # KiB


def seeds() -> dict[str, list[bytes]]:
    colour, grey = Image.fromarray(noise(0, 24)), Image.fromarray(noise(1, 24, channels=1))
    deep = Image.fromarray((noise(2, 24, channels=1).astype(np.uint16) << 8) + 7)
    clear, palette = colour.convert("RGBA"), colour.quantize(16)
    palette.info["transparency"] = 3
    frames = {"save_all": True, "append_images": [Image.fromarray(noise(3, 24))]}
    found = {name: [encoded(colour, name), encoded(grey, name)] for name in FORMATS}
    found["PNG"] += [encoded(deep, "PNG"), encoded(clear, "PNG"), encoded(palette, "PNG", transparency=3),
                     encoded(grey.convert("1"), "PNG")]  # fmt: skip
    found["TIFF"] += [encoded(deep, "TIFF"), encoded(colour, "TIFF", compression="tiff_lzw"),
                      encoded(colour, "TIFF", compression="tiff_adobe_deflate"),
                      encoded(colour.convert("CMYK"), "TIFF")]  # fmt: skip
    found["JPEG"] += [encoded(colour.convert("CMYK"), "JPEG"), encoded(colour, "JPEG", progressive=True)]
    found["GIF"] += [encoded(colour, "GIF", **frames)]
    found["WEBP"] += [encoded(colour, "WEBP", **frames), encoded(clear, "WEBP", lossless=True)]
    return found


SEEDS = seeds()


def refused(data: bytes, channels: int, decoder: Literal["exact", "fast"]) -> str:
    """Return the reason why a file is refused, or ""."""
    try:
        assert read_image(data, channels, MAX_PIXELS, decoder).square(8).shape == (8, 8, channels)
    except BadImage as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", FORMATS)
def test_changed_image_files_decode_or_are_refused(kind: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @examples(40)
    @given(mutated(SEEDS[kind]), st.sampled_from([1, 3]))
    def check(data: bytes, channels: int) -> None:
        begun = time.monotonic()
        with suppress(BadImage):
            image = decode(data, channels, MAX_PIXELS)
            assert image.mode == ("L" if channels == 1 else "RGB")
            assert image.width * image.height <= MAX_PIXELS
            pixels = read_image(data, channels, MAX_PIXELS).square(8)
            assert pixels.shape == (8, 8, channels) and pixels.dtype == np.uint8
            is_colour(data)
        assert refused(data, channels, "exact") == refused(data, channels, "fast")
        assert time.monotonic() - begun < 10

    check()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MAX_GROWTH
