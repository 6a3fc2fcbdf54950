"""A folder of photographs of several sizes, encoded without any training, and back."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import functa
from functa.models.field.field import Field
from functa.storage.errors import StorageError
from functa.storage.functaset.functaset import Functaset
from functa.storage.places.address import open_location
from functa.storage.upkeep.verify import verify
from functa.tasks.inference.open_models import load_ready_field
from functa.tasks.inference.photographs import encode as encoding
from functa.tasks.inference.photographs.decode import decode_photographs
from functa.tasks.inference.photographs.encode import Encoded, encode_folder
from functa.tasks.inference.photographs.store import functasets_by_size, only_functaset
from functa.tasks.inference.ready.field import Coder, ReadyField
from tests.helpers.tasks.ready_fields import write_photograph, write_ready

SIZES = {"a.png": (13, 18), "b.png": (18, 13), "deep/c.png": (13, 18), "d.png": (16, 16)}


@pytest.fixture
def ready(tmp_path: Path) -> ReadyField:
    write_ready(tmp_path / "field")
    return load_ready_field(tmp_path / "field" / "tiny.json")


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    for number, (name, size) in enumerate(SIZES.items()):
        write_photograph(tmp_path / "photographs" / name, *size, seed=number)
    return tmp_path / "photographs"


def encoded(ready: ReadyField, photographs: Path, store: Path, **options: int) -> Encoded:
    return encode_folder(ready, str(photographs), str(store), **options)  # type: ignore[arg-type]


def test_every_image_comes_back_at_its_own_size_and_at_twice_that(
    ready: ReadyField, photographs: Path, tmp_path: Path
) -> None:
    done = encoded(ready, photographs, tmp_path / "store")
    assert (len(done.psnr), done.bad, done.present, done.psnr) == (4, {}, 0, done.psnr_stored)
    uris = functasets_by_size(str(tmp_path / "store"))
    assert [uri.rpartition("/")[2] for uri in uris] == ["13x18.zarr", "16x16.zarr", "18x13.zarr"]
    assert decode_photographs(uris, tmp_path / "once") == decode_photographs(uris, tmp_path / "twice", 2) == 4
    for name, (height, width) in SIZES.items():
        once, twice = (Image.open(tmp_path / folder / name) for folder in ("once", "twice"))
        assert (once.size, twice.size) == ((width, height), (2 * width, 2 * height))
        pixels = np.asarray(Image.open(photographs / name))
        np.testing.assert_array_equal(np.asarray(once), ready.decode(ready.encode(pixels), (height, width)))


def test_the_store_records_size_and_padding_and_passes_verification(
    ready: ReadyField, photographs: Path, tmp_path: Path
) -> None:
    encoded(ready, photographs, tmp_path / "store", bits=8, steps=5)
    for uri in functasets_by_size(str(tmp_path / "store")):
        functaset = Functaset.open(uri)
        sizes = (functaset.fingerprint["images.height"], functaset.fingerprint["images.width"])
        assert f"{sizes[1]}x{sizes[0]}.zarr" == uri.rpartition("/")[2]
        assert functaset.fingerprint["images.padding"] == "pixels of the border, to whole patches of 4x4"
        assert (functaset.fingerprint["inner.steps"], functaset.info()["bits"]) == (5, 8)
        assert functaset.latent_shape == (*ready.grid(*sizes), 8)
        assert verify(open_location(uri), deep=True).bad == []
        alone = functa.load_field(uri)  # the field in it, with the steps that encoded
        assert isinstance(alone, ReadyField) and alone.inner.steps == 5


def test_psnr_is_of_the_images_own_pixels(ready: ReadyField, photographs: Path, tmp_path: Path) -> None:
    done = encoded(ready, photographs, tmp_path / "store")
    expected = []
    for name, size in SIZES.items():
        pixels = np.asarray(Image.open(photographs / name)).astype(np.float32) / 255
        error = np.square(ready.decode(ready.encode(pixels), size, dtype="float32") - pixels).mean()
        expected.append(-10 * np.log10(error))
    assert sorted(done.psnr) == pytest.approx(sorted(expected), abs=1e-3)
    assert done.pixels == sum(height * width for height, width in SIZES.values())


def test_the_second_run_encodes_what_is_new_or_has_changed(
    ready: ReadyField, photographs: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    encoded(ready, photographs, store, bits=8)
    again = encoded(ready, photographs, store, bits=8)
    assert (again.psnr, again.present, again.functasets) == ([], 4, [])
    write_photograph(photographs / "a.png", 13, 18, seed=9)  # changed
    write_photograph(photographs / "d.png", 20, 16, seed=8)  # of another size
    write_photograph(photographs / "e.png", 13, 18, seed=7)  # new
    (photographs / "b.png").unlink()  # stays in the store
    third = encoded(ready, photographs, store, bits=8)
    assert (len(third.psnr), third.present) == (3, 1)
    rows = {uri.rpartition("/")[2]: Functaset.open(uri).rows("train") for uri in functasets_by_size(str(store))}
    assert rows == {"13x18.zarr": 1, "16x16.zarr": 0, "16x20.zarr": 1, "18x13.zarr": 3}
    out = tmp_path / "out"
    assert decode_photographs(functasets_by_size(str(store)), out) == 5
    a = np.asarray(Image.open(photographs / "a.png")).astype(int)
    closer = np.abs(np.asarray(Image.open(out / "a.png")).astype(int) - a).mean()
    assert closer < np.abs(np.asarray(Image.open(out / "e.png")).astype(int) - a).mean()


def test_an_interrupted_encoding_continues(
    ready: ReadyField, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each image is a shard; the third one fails."""
    monkeypatch.setattr(encoding, "SHARD_BYTES", 1)
    calls, original = [0], Coder.encode

    def encode(self: Coder, images: object) -> object:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return original(self, images)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Coder, "encode", encode)
        encoded(ready, photographs, tmp_path / "store")
    done = encoded(ready, photographs, tmp_path / "store")
    assert len(done.psnr) + done.present < 4 + 1 and len(done.psnr) <= 2
    assert decode_photographs(functasets_by_size(str(tmp_path / "store")), tmp_path / "out") == 4


def test_one_folder_with_another_field_or_coding_is_refused(
    ready: ReadyField, photographs: Path, tmp_path: Path
) -> None:
    encoded(ready, photographs, tmp_path / "store")
    with pytest.raises(StorageError, match=r"encoded otherwise \(quantization.bits: 32 -> 8\); choose another --out"):
        encoded(ready, photographs, tmp_path / "store", bits=8)
    with pytest.raises(StorageError, match=r"inner\.steps: 3 -> 7"):
        encoded(ready, photographs, tmp_path / "store", steps=7)
    with pytest.raises(StorageError, match="is a functaset itself"):
        encoded(ready, photographs, tmp_path / "store" / "16x16.zarr")


def test_images_that_do_not_fit_are_refused_before_anything_is_encoded(
    ready: ReadyField, photographs: Path, tmp_path: Path
) -> None:
    write_photograph(photographs / "small.png", 3, 40)
    with pytest.raises(StorageError, match=r"small.png: 40x3 pixels are fewer than a patch of the field tiny, 4x4"):
        encoded(ready, photographs, tmp_path / "store")
    (photographs / "small.png").unlink()
    write_ready(tmp_path / "grey", image_channels=1)
    grey = load_ready_field(tmp_path / "grey" / "tiny.json")
    with pytest.raises(StorageError, match=r"a.png: is a colour image, and the field tiny knows grey ones only"):
        encoded(grey, photographs, tmp_path / "store")
    with pytest.raises(StorageError, match="no such folder or file"):
        encoded(ready, tmp_path / "nowhere", tmp_path / "store")
    assert not list((tmp_path / "store").rglob("*zarr.json"))


def test_grey_images_become_colour_ones_for_a_field_of_colour(ready: ReadyField, tmp_path: Path) -> None:
    pixels = write_photograph(tmp_path / "grey" / "g.png", 9, 9, grey=True)
    assert encoded(ready, tmp_path / "grey", tmp_path / "store").grey == 1
    decode_photographs(functasets_by_size(str(tmp_path / "store")), tmp_path / "out")
    colour = np.repeat(pixels[..., None], 3, -1)
    expected = ready.decode(ready.encode(colour), (9, 9))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / "g.png")), expected)


def test_unreadable_files_are_named_and_left_out(ready: ReadyField, photographs: Path, tmp_path: Path) -> None:
    (photographs / "broken.png").write_bytes(b"no image")
    done = encoded(ready, photographs, tmp_path / "store")
    assert len(done.psnr) == 4 and list(done.bad) == ["broken.png"]
    assert "not an image of a known format" in done.bad["broken.png"]
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "broken.png").write_bytes(b"no image")
    with pytest.raises(StorageError, match=r"none of 1 image files can be read; the first: broken\.png"):
        encoded(ready, empty, tmp_path / "other")


def test_a_store_of_several_sizes_is_named_by_one_of_them(ready: ReadyField, photographs: Path, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    encoded(ready, photographs, tmp_path / "store")
    with pytest.raises(StorageError, match=r"holds 3 functasets, one for each size of images: name one \(13x18.zarr"):
        only_functaset(store)
    assert only_functaset(f"{store}/16x16.zarr") == f"{store}/16x16.zarr"
    assert only_functaset(str(tmp_path / "nowhere")) == str(tmp_path / "nowhere")
    assert functasets_by_size(f"{store}/16x16.zarr") == [f"{store}/16x16.zarr"]


@pytest.mark.attacks
def test_an_image_is_never_written_outside_the_folder(ready: ReadyField, tmp_path: Path) -> None:
    """Keys are those of a store that somebody else may have made."""
    from functa.tasks.inference.photographs import decode

    for key in ("../a.png", "/etc/a.png", "a/../../b.png", ""):
        with pytest.raises(StorageError, match="not a relative key"):
            decode._file_name(key, set())
    written: set[str] = set()
    assert [decode._file_name(key, written) for key in ("x/a.jpg", "x/a.png")] == ["x/a.png", "x/a.png.png"]


def test_the_copied_functaset_of_one_size_decodes_alone(ready: ReadyField, photographs: Path, tmp_path: Path) -> None:
    encoded(ready, photographs, tmp_path / "store", bits=8)
    moved = (tmp_path / "store" / "18x13.zarr").rename(tmp_path / "elsewhere.zarr")
    assert decode_photographs(functasets_by_size(str(moved)), tmp_path / "out") == 2
    described = json.loads(next((moved / "fields").glob("*.json")).read_text())
    assert described["config"]["resolution"] == 4
    assert isinstance(ready.module, Field)
