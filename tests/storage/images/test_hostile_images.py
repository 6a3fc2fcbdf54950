"""Images and arrays made to take memory, run code or break names."""

import io
import os
import struct
import tracemalloc
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from functa.storage.config import ImagesConfig
from functa.storage.errors import StorageError
from functa.storage.images.files import MAX_FILE_BYTES, BadImage, decode
from functa.storage.images.source import open_images
from functa.storage.places.local import LocalLocation
from functa.storage.places.location import Entry
from tests.helpers.storage.image_files import class_folders, encoded, noise

pytestmark = [
    pytest.mark.attacks,
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of_size(width: int, height: int) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.faults
@pytest.mark.parametrize("side", [10_000, 60_000, 2_000_000_000])
def test_a_bomb_is_refused_from_its_header(side: int) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(BadImage):
            decode(png_of_size(side, side), 3, max_pixels=50_000_000)
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()
    with pytest.raises(BadImage, match=r"10000x10000 pixels are more than images\.max_pixels=50000000"):
        decode(png_of_size(10_000, 10_000), 3, max_pixels=50_000_000)


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_garbled_files_of_every_format_are_refused_or_decoded_never_more(kind: str) -> None:
    data = encoded(Image.fromarray(noise(0, 16)), kind)
    assert decode(data, 3, 1000).size == (16, 16)
    generator = np.random.default_rng(0)
    for _ in range(60):
        garbled = bytearray(data)
        for at in generator.integers(0, len(data), 3):
            garbled[at] = int(generator.integers(256))
        with suppress(BadImage):
            assert decode(bytes(garbled[: generator.integers(1, len(data) + 1)]), 3, 1000).mode == "RGB"


@pytest.mark.parametrize("kind", ["ICO", "PDF", "EPS", "TGA", "PCX"])
def test_other_formats_are_not_even_tried(kind: str) -> None:
    with pytest.raises(BadImage, match="not an image of a known format"):
        decode(encoded(Image.fromarray(noise(0, 16)), kind), 3, 1000)


def test_float_images_are_refused_as_their_range_is_not_known() -> None:
    with pytest.raises(BadImage, match="no known range"):
        decode(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), 1, 1000)


def test_names_that_are_no_text_and_links_in_a_circle_are_survived(tmp_path: Path) -> None:
    class_folders(tmp_path, per_class=4)
    os.symlink(tmp_path, tmp_path / "cat" / "up")
    os.symlink(tmp_path / "nowhere", tmp_path / "cat" / "dangling.png")
    odd = os.fsencode(tmp_path / "cat") + b"/\xff<script>\n.png"
    Path(os.fsdecode(odd)).write_bytes(encoded(Image.fromarray(noise(5))))
    images = open_images(ImagesConfig(source="folder", location=str(tmp_path)))
    keys = [*images.split("train").keys, *images.split("test").keys]
    assert len(keys) == 9
    for key in keys:
        assert key.encode()
    for name in ("train", "test"):
        assert images.split(name).read(range(len(images.split(name)))).good.all()


def npz(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return path


def npy(array: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def header(shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


IMAGES = npy(np.zeros((4, 8, 8), np.uint8))
LABELS = npy(np.zeros(4, np.int64))
HOSTILE = {
    "pickled labels": {"images": IMAGES, "labels": npy(np.array([{}] * 4, object), allow_pickle=True)},
    "a terabyte declared": {"images": header((1 << 24, 256, 256)), "labels": LABELS},
    "more declared than there is": {"images": header((4, 800, 800)), "labels": LABELS},
    "negative shape": {"images": header((-4, 8, 8)), "labels": LABELS},
    "labels of another length": {"images": IMAGES, "labels": npy(np.zeros(5, np.int64))},
    "float images": {"images": npy(np.zeros((4, 8, 8))), "labels": LABELS},
    "negative labels": {"images": IMAGES, "labels": npy(np.full(4, -1))},
    "no images": {"labels": LABELS},
    "no array": {"images": b"hello", "labels": LABELS},
    "a flat array": {"images": npy(np.zeros(4, np.uint8)), "labels": LABELS},
}


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_npz_files_are_refused_in_one_line_before_memory_is_taken(tmp_path: Path, hostile: str) -> None:
    path = npz(tmp_path / "x.npz", **HOSTILE[hostile])
    tracemalloc.start()
    try:
        with pytest.raises(StorageError, match=r"x\.npz: ") as error:
            open_images(ImagesConfig(source="npz", location=str(path)))
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()
    assert "\n" not in str(error.value)


def test_an_npz_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(StorageError, match=r"x\.npz: "):
        open_images(ImagesConfig(source="npz", location=str(tmp_path / "x.npz")))


def test_a_link_to_itself_hides_nothing_else(tmp_path: Path) -> None:
    class_folders(tmp_path, per_class=4)
    os.symlink("self.png", tmp_path / "cat" / "self.png")
    os.symlink("two", tmp_path / "one")
    os.symlink("one", tmp_path / "two")
    images = open_images(ImagesConfig(source="folder", location=str(tmp_path)))
    assert len(images.split("train")) + len(images.split("test")) == 8


@pytest.mark.faults
def test_a_file_of_more_bytes_than_the_cap_is_not_read(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", per_class=2)
    class_folders(tmp_path / "test", per_class=1)
    with open(tmp_path / "train/cat/huge.png", "wb") as file:
        file.write(encoded(Image.fromarray(noise(1))))
        file.truncate(MAX_FILE_BYTES + 1)  # a hole: it takes no space on the disk
    split = open_images(ImagesConfig(source="folder", location=str(tmp_path))).split("train")
    tracemalloc.start()
    try:
        batch = split.read(range(len(split)))
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()
    (row,) = batch.reasons
    assert split.keys[row] == "train/cat/huge.png"
    assert "more bytes than a file may have" in batch.reasons[row]
    assert batch.good.sum() == 4


def test_a_file_that_grew_while_it_was_read_is_bad_until_it_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class_folders(tmp_path / "train", per_class=2)
    class_folders(tmp_path / "test", per_class=1)
    path = tmp_path / "train/cat/000.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:60])
    split = open_images(ImagesConfig(source="folder", location=str(tmp_path), resolution=8)).split("train")
    real = LocalLocation.entry

    def then_it_grows(place: LocalLocation, key: str) -> Entry | None:
        entry = real(place, key)
        path.write_bytes(whole)
        return entry

    with monkeypatch.context() as patch:
        patch.setattr(LocalLocation, "entry", then_it_grows)
        batch = split.read([split.keys.index("train/cat/000.png")])
    assert batch.reasons == {0: "changed while it was read"}
    assert split.read([split.keys.index("train/cat/000.png")]).good.all()
