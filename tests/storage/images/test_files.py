"""One image file's bytes to 8-bit pixels, against closed forms, in files put together by hand; the fast decoder."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from cykooz_resizer import CpuExtensions, FilterType, ResizeAlg, ResizeOptions, Resizer
from PIL import Image
from sklearn.datasets import load_sample_image

from functa.storage.images import files
from functa.storage.images.files import BadImage, decode, read_image
from tests.helpers.storage.image_files import encoded

DEEP = (65535, 32768, 128, 129, 0)  # v / 257, rounded: 255, 128, 0, 1, 0
EIGHT = [255, 128, 0, 1, 0]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(bits: int, colour: int, row: bytes, width: int, **chunks: bytes) -> bytes:
    """One row of pixels. Colour types: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, colour, 0, 0, 0))
    others = b"".join(chunk(name.encode(), data) for name, data in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + head + others + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")


def tiff(order: str, bits: int, photometric: int, samples: int, data: bytes, width: int) -> bytes:
    """One uncompressed row; order "<" is II, ">" is MM; photometric 0 min-is-white, 1 min-is-black, 2 RGB."""
    entries = 9
    depths = struct.pack(f"{order}{samples}H", *[bits] * samples)
    after = 8 + 2 + 12 * entries + 4
    begin = after + len(depths)
    inline = depths.ljust(4, b"\0") if len(depths) <= 4 else struct.pack(f"{order}I", after)

    def short(value: int) -> bytes:
        return struct.pack(f"{order}HH", value, 0)

    fields = [
        (256, 3, 1, short(width)), (257, 3, 1, short(1)), (258, 3, samples, inline), (259, 3, 1, short(1)),
        (262, 3, 1, short(photometric)), (273, 4, 1, struct.pack(f"{order}I", begin)), (277, 3, 1, short(samples)),
        (278, 3, 1, short(1)), (279, 4, 1, struct.pack(f"{order}I", len(data))),
    ]  # fmt: skip
    table = b"".join(struct.pack(f"{order}HHI", *field[:3]) + field[3] for field in fields)
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IH", 8, entries)
    return head + table + struct.pack(f"{order}I", 0) + depths + data


def words(*values: int, order: str = ">") -> bytes:
    return struct.pack(f"{order}{len(values)}H", *values)


def pixels(data: bytes, channels: int) -> list:  # type: ignore[type-arg]
    """Return the pixels of the first row."""
    found: list = np.asarray(decode(data, channels, 10**6))[0].tolist()  # type: ignore[type-arg]
    return found


GREY = {
    "PNG, 16 bits": (png(16, 0, words(*DEEP), 5), EIGHT),
    "TIFF, 16 bits, little end first": (tiff("<", 16, 1, 1, words(*DEEP, order="<"), 5), EIGHT),
    "TIFF, 16 bits, big end first": (tiff(">", 16, 1, 1, words(*DEEP), 5), EIGHT),
    "TIFF, 16 bits, zero is white": (tiff("<", 16, 0, 1, words(*DEEP, order="<"), 5), [0, 127, 255, 254, 255]),
    "TIFF, 12 bits": (tiff("<", 12, 1, 1, bytes([0xFF, 0xF8, 0x00]), 2), [255, 128]),
    "PGM, 16 bits": (b"P5 5 1 65535\n" + words(*DEEP), EIGHT),
    "PGM of 10 bits": (b"P5 3 1 1023\n" + words(1023, 512, 0), [255, 128, 0]),
    "PGM in plain text": (b"P2 3 1 65535\n65535 32768 128\n", [255, 128, 0]),
    "PGM of 4 bits": (b"P5 3 1 15\n" + bytes([15, 8, 0]), [255, 136, 0]),
    "PNG, 16 bits and alpha: on white": (png(16, 4, words(65535, 65535, 0, 32768), 2), [255, 127]),
    "PNG, 16 bits, one level is transparent": (png(16, 0, words(*DEEP), 5, tRNS=words(128)), [255, 128, 255, 1, 0]),
    "PNG, 1 bit, black is transparent": (png(1, 0, b"\xa0", 8, tRNS=words(0)), [255] * 8),
    "PNG, 1 bit, white is transparent": (png(1, 0, b"\xa0", 8, tRNS=words(1)), [255, 0, 255, 0, 0, 0, 0, 0]),
    "PNG, 2 bits, one level is transparent": (png(2, 0, b"\x1b", 4, tRNS=words(1)), [0, 255, 170, 255]),
    "PNG, 4 bits, one level is transparent": (png(4, 0, b"\x5a", 2, tRNS=words(5)), [255, 170]),
    "PNG, 8 bits, one level is transparent": (png(8, 0, bytes([5, 10]), 2, tRNS=words(5)), [255, 10]),
    "PNG, 1 bit": (png(1, 0, b"\xa0", 8), [255, 0, 255, 0, 0, 0, 0, 0]),
    "PNG, 2 bits": (png(2, 0, b"\x1b", 4), [0, 85, 170, 255]),
    "PBM, where a one is black": (b"P4 8 1\n\xa0", [0, 255, 0, 255, 255, 255, 255, 255]),
    "TIFF, 8 bits, zero is white": (tiff("<", 8, 0, 1, bytes([0, 1, 255]), 3), [255, 254, 0]),
}
COLOURED = bytes([255, 0, 0, 0, 255, 0, 0, 0, 255])
COLOUR = {
    "PNG, 16 bits: the high bytes": (
        png(16, 2, words(65535, 32768, 0, 255, 256, 32895), 2), [[255, 128, 0], [0, 1, 128]],
    ),
    "TIFF, 16 bits, big end first": (tiff(">", 16, 2, 3, words(65535, 32768, 0), 1), [[255, 128, 0]]),
    "PPM, 16 bits": (b"P6 1 1 65535\n" + words(65535, 32768, 128), [[255, 128, 0]]),
    "PNG, 16 bits and alpha": (png(16, 6, words(65535, 32768, 0, 65535, 0, 0, 0, 0), 2), [[255, 128, 0], [255] * 3]),
    "PNG, a palette of which two colours are transparent": (
        png(8, 3, bytes([0, 1, 2]), 3, PLTE=COLOURED, tRNS=bytes([0, 128])), [[255] * 3, [127, 255, 127], [0, 0, 255]],
    ),
    "PNG, a palette of 1 bit": (png(1, 3, b"\x40", 2, PLTE=COLOURED), [[255, 0, 0], [0, 255, 0]]),
    "PNG, one colour is transparent": (
        png(8, 2, COLOURED, 3, tRNS=words(0, 255, 0)), [[255, 0, 0], [255] * 3, [0, 0, 255]],
    ),
    "PNG, 16 bits, one colour is transparent": (
        png(16, 2, words(65535, 0, 0, 0, 65535, 0), 2, tRNS=words(0, 65535, 0)), [[255, 0, 0], [255] * 3],
    ),
    "TIFF, CMYK": (tiff("<", 8, 5, 4, bytes([0, 255, 255, 0]), 1), [[255, 0, 0]]),
    "16 bits of grey as colour": (png(16, 0, words(32768), 1), [[128] * 3]),
}  # fmt: skip


@pytest.mark.faults
@pytest.mark.parametrize("what", GREY)
def test_grey_of_any_depth_is_scaled_by_its_full_range(what: str) -> None:
    data, expected = GREY[what]
    assert pixels(data, 1) == expected


@pytest.mark.faults
@pytest.mark.parametrize("what", COLOUR)
def test_colour_of_any_kind_becomes_rgb_on_white(what: str) -> None:
    data, expected = COLOUR[what]
    assert pixels(data, 3) == expected


@pytest.mark.faults
def test_cmyk_in_a_jpeg_is_inverted_as_adobe_writes_it() -> None:
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    assert b"Adobe" in data
    marker = data.index(b"\xff\xee")
    bare = data[:marker] + data[marker + 2 + int.from_bytes(data[marker + 2 : marker + 4]) :]
    for each in (data, bare):  # those without Adobe's marker are as Pillow takes them
        np.testing.assert_allclose(np.asarray(decode(each, 3, 10**6)), np.full((16, 16, 3), [255, 0, 0]), atol=2)


@pytest.mark.faults
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_every_exif_orientation_at_8_and_16_bits(orientation: int, depth: type) -> None:
    raw = np.arange(6, dtype=np.uint8).reshape(2, 3) * 10
    upright = {
        1: raw, 2: raw[:, ::-1], 3: raw[::-1, ::-1], 4: raw[::-1],
        5: raw.T, 6: np.rot90(raw, -1), 7: raw[::-1, ::-1].T, 8: np.rot90(raw),
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = raw if depth is np.uint8 else raw.astype(np.uint16) * 257
    for kind in ("PNG", "TIFF"):
        found = np.asarray(decode(encoded(Image.fromarray(stored), kind, exif=exif), 1, 10**6))
        np.testing.assert_array_equal(found, upright[orientation])


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "TIFF"])
def test_of_several_frames_the_first_counts(kind: str) -> None:
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert pixels(data, 3) == [[255, 0, 0]] * 2


@pytest.mark.faults
@pytest.mark.parametrize(
    "data",
    [tiff("<", 32, 1, 1, struct.pack("<II", 5, 300), 2), b"Pf 1 1\n-1.0\n" + struct.pack("<f", 0.5)],
    ids=["32-bit TIFF", "float PFM"],
)
def test_numbers_without_a_known_range_are_refused(data: bytes) -> None:
    with pytest.raises(BadImage, match="no known range"):
        decode(data, 1, 10**6)


@pytest.mark.attacks
@pytest.mark.parametrize("kind", [b"iCCP", b"zTXt", b"iTXt"])
def test_a_bomb_beside_the_pixels_is_refused(kind: bytes) -> None:
    head = {b"iCCP": b"x\0\0", b"zTXt": b"x\0\0", b"iTXt": b"x\0\1\0\0\0"}[kind]
    data = png(8, 0, b"\7", 1, **{kind.decode(): head + zlib.compress(bytes(20 << 20))})
    with pytest.raises(BadImage, match="too large"):
        decode(data, 1, 10**6)


def photograph(width: int, height: int, **options: Any) -> bytes:
    """Return a JPEG of scikit-learn's photograph of a temple."""
    image = Image.fromarray(load_sample_image("china.jpg")).resize((width, height), Image.Resampling.LANCZOS)
    return encoded(image, "JPEG", **{"quality": 90} | options)


def decibels(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, np.mean((one.astype(float) - other) ** 2))))


def both(data: bytes, side: int, box: Any = None, channels: int = 3) -> tuple[np.ndarray, np.ndarray]:
    exact, fast = (read_image(data, channels, 10**7, decoder).square(side, box) for decoder in ("exact", "fast"))  # type: ignore[arg-type]
    return exact, fast


def test_the_fast_decoder_keeps_the_detail_of_the_exact_one() -> None:
    for size, side, least in (((500, 375), 256, 53), ((2000, 1500), 256, 41), ((500, 375), 32, 38), ((80, 60), 90, 53)):
        exact, fast = both(photograph(*size), side)
        assert exact.shape == fast.shape == (side, side, 3) and decibels(exact, fast) > least
    exact, fast = both(photograph(300, 200), 32, channels=1)
    assert exact.shape == (32, 32, 1) and decibels(exact, fast) > 39


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_a_jpeg_is_decoded_at_the_fraction_that_each_part_of_it_allows(
    subsampling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = photograph(1601, 1203, subsampling=subsampling)
    exact = read_image(data, 3, 10**7)
    scales: list[int] = []
    real = files._pixels
    monkeypatch.setattr(files, "_pixels", lambda *given: (scales.append(given[3]), real(*given))[1])
    image = read_image(data, 3, 10**7, "fast")
    boxes = [(0, 0, 1601, 1203), (1.5, 2.25, 719, 1203), (500, 400, 1601, 758.5), (1300.5, 900, 1601, 1203)]
    for box in boxes:
        assert decibels(exact.square(128, box), image.square(128, box)) > 39
    assert scales == [4, 2, 1]  # of 716, 358, 300 pixels at least 1.4 x 128 are left; each fraction is decoded once
    for box in reversed(boxes):  # whatever was made before
        again = read_image(data, 3, 10**7, "fast")
        np.testing.assert_array_equal(again.square(128, box), image.square(128, box))


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return photograph(800, 600, exif=exif)


WHOLE = {
    "progressive": photograph(800, 600, progressive=True),
    "turned by EXIF": turned(),
    "CMYK": encoded(Image.open(io.BytesIO(photograph(800, 600))).convert("CMYK"), "JPEG"),
    "PNG": encoded(Image.open(io.BytesIO(photograph(800, 600))), "PNG"),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_what_is_no_plain_jpeg_is_decoded_whole_and_only_resized_fast(kind: str) -> None:
    assert not read_image(WHOLE[kind], 3, 10**7, "fast")._scales
    exact, fast = both(WHOLE[kind], 64)
    assert decibels(exact, fast) > 50


@pytest.mark.faults
def test_the_fast_decoder_refuses_what_the_exact_one_refuses() -> None:
    data = photograph(400, 300)
    for cut in (*range(0, len(data), len(data) // 40), len(data) - 2, len(data) - 1):
        reasons = []
        for decoder in ("exact", "fast"):
            with pytest.raises(BadImage) as error:
                read_image(data[:cut], 3, 10**6, decoder).square(32)  # type: ignore[arg-type]
            reasons.append(str(error.value))
        assert reasons[0] == reasons[1]
    for decoder in ("exact", "fast"):
        with pytest.raises(BadImage, match="400x300 pixels are more than"):
            read_image(data, 3, 10**5, decoder)  # type: ignore[arg-type]


def test_the_fast_filter_gives_the_same_pixels_on_every_processor() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (375, 500, 3), np.uint8))
    made = set()
    for extensions in (CpuExtensions.none, None):
        resizer = Resizer()
        if extensions:
            resizer.cpu_extensions = extensions
        square = Image.new("RGB", (256, 256))
        resizer.resize_pil(image, square, ResizeOptions(resize_alg=ResizeAlg.convolution(FilterType.catmull_rom)))
        made.add(square.tobytes())
    assert len(made) == 1
