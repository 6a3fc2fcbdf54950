import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from functa.storage.config import ImagesConfig
from functa.storage.errors import StorageError
from functa.storage.images.source import Images, listed_once, open_images
from functa.storage.places.local import LocalLocation
from tests.helpers.storage.image_files import class_folders, encoded, noise

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def folder(path: Path, **changes: object) -> Images:
    return open_images(ImagesConfig.model_validate({"source": "folder", "location": str(path)} | changes))


def test_digits_are_split_1497_to_300_over_the_classes_with_all_their_levels() -> None:
    from sklearn.datasets import load_digits

    images = open_images(ImagesConfig())
    train, test = images.split("train"), images.split("test")
    assert (images.channels, images.resolution, images.classes) == (1, 8, [str(i) for i in range(10)])
    assert (len(train), len(test)) == (1497, 300)
    assert len({*train.keys, *test.keys}) == 1797
    assert np.bincount(test.labels).min() >= 29
    assert np.bincount(test.labels).max() <= 31
    assert train.labels.dtype == np.int32
    batch = test.read(np.arange(300))
    assert batch.good.all()
    original = load_digits().images[[int(key[-4:]) for key in test.keys]]
    np.testing.assert_array_equal(np.round(batch.images[..., 0] / 255 * 16), original)
    again = open_images(ImagesConfig())
    assert again.split("train").keys == train.keys
    assert again.split("train").tokens == train.tokens
    assert open_images(ImagesConfig(split_seed=1)).split("test").keys != test.keys


def test_class_folders_are_split_stratified_and_read_in_any_order(tmp_path: Path) -> None:
    class_folders(tmp_path, per_class=12, classes=("ant", "bee", "cow"))
    images = folder(tmp_path, test_fraction=0.25, split="stratified")
    train, test = images.split("train"), images.split("test")
    assert images.classes == ["ant", "bee", "cow"]
    assert np.bincount(train.labels).tolist() == [9, 9, 9]
    assert np.bincount(test.labels).tolist() == [3, 3, 3]
    assert not {*train.keys} & {*test.keys}
    batch = train.read([26, 0, 5])
    for row, at in ((26, 0), (0, 1), (5, 2)):
        file = tmp_path / train.keys[row]
        assert images.classes[train.labels[row]] == file.parent.name
        np.testing.assert_array_equal(batch.images[at], np.asarray(Image.open(file)))
        assert bytes(batch.sha256[at]) == hashlib.sha256(file.read_bytes()).digest()


def test_train_and_test_folders_are_the_splits(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", per_class=5)
    class_folders(tmp_path / "test", per_class=2)
    images = folder(tmp_path)
    assert images.classes == ["cat", "dog"]
    assert [len(images.split(name)) for name in ("train", "test")] == [10, 4]
    assert images.split("test").keys[0] == "test/cat/000.png"
    class_folders(tmp_path / "extra")
    with pytest.raises(StorageError, match="extra and test and train; expected"):
        folder(tmp_path)


def test_a_changed_file_has_another_token(tmp_path: Path) -> None:
    class_folders(tmp_path)
    before = dict(zip(folder(tmp_path).split("train").keys, folder(tmp_path).split("train").tokens))
    key = next(iter(before))
    (tmp_path / key).write_bytes(encoded(Image.fromarray(noise(999))))
    split = folder(tmp_path).split("train")
    assert {k for k, token in zip(split.keys, split.tokens) if token != before[k]} == {key}


@pytest.mark.faults
def test_bad_images_among_good_ones_are_named_and_shift_no_label(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", per_class=6)
    class_folders(tmp_path / "test", per_class=1)
    good = (tmp_path / "train/cat/000.png").read_bytes()
    bad = {
        "cat/001.png": (good[: len(good) // 2], "does not decode"),
        "cat/003.png": (b"", "empty"),
        "dog/002.png": (b"<html><body>404 Not Found</body></html>", "not an image of a known format"),
        "dog/004.png": (encoded(Image.new("RGB", (9, 8))), "9x8 pixels where the first image has 8x8"),
    }
    for name, (data, _) in bad.items():
        (tmp_path / "train" / name).write_bytes(data)
    (tmp_path / "train/cat/.DS_Store").write_bytes(b"x")
    (tmp_path / "train/cat/notes.txt").write_bytes(b"x")
    split = folder(tmp_path).split("train")
    assert len(split) == 12
    batch = split.read(range(12))
    reasons = {split.keys[row].removeprefix("train/"): reason for row, reason in batch.reasons.items()}
    assert reasons.keys() == bad.keys()
    for name, (_, reason) in bad.items():
        assert reason in reasons[name]
    assert not batch.images[~batch.good].any()
    for row in np.flatnonzero(batch.good):
        np.testing.assert_array_equal(batch.images[row], np.asarray(Image.open(tmp_path / split.keys[row])))


def test_reading_returns_the_version_of_each_image(tmp_path: Path) -> None:
    class_folders(tmp_path)
    split = folder(tmp_path).split("train")
    assert split.read(range(len(split))).tokens == split.tokens
    (tmp_path / split.keys[2]).write_bytes(encoded(Image.fromarray(noise(77))))
    read = split.read(range(len(split))).tokens
    assert [a == b for a, b in zip(read, split.tokens)] == [row != 2 for row in range(len(split))]


def test_an_array_row_that_changes_its_label_is_another_version(tmp_path: Path) -> None:
    tokens = []
    for label in (0, 1):
        labels = np.arange(20) % 2
        labels[4] = label
        np.savez(tmp_path / "x.npz", images=np.zeros((20, 8, 8), np.uint8), labels=labels)
        images = open_images(ImagesConfig(source="npz", location=str(tmp_path / "x.npz"), test_fraction=0.1))
        tokens.append({k: t for s in images.splits.values() for k, t in zip(s.keys, s.tokens)})
    assert [key for key in tokens[0] if tokens[0][key] != tokens[1][key]] == ["all/0000004"]


def test_a_file_that_vanished_is_a_bad_row(tmp_path: Path) -> None:
    class_folders(tmp_path)
    split = folder(tmp_path).split("train")
    (tmp_path / split.keys[3]).unlink()
    batch = split.read(range(len(split)))
    assert batch.reasons.keys() == {3}
    assert batch.reasons[3] == "no longer there"


def pixels_of(tmp_path: Path, data: bytes, ending: str = "png", **changes: object) -> np.ndarray:
    """The file as the folder source reads it."""
    class_folders(tmp_path / "train", per_class=1)
    class_folders(tmp_path / "test", per_class=1)
    (tmp_path / f"train/cat/zzz.{ending}").write_bytes(data)
    split = folder(tmp_path, **changes).split("train")
    batch = split.read([split.keys.index(f"train/cat/zzz.{ending}")])
    assert batch.good.all(), batch.reasons
    return batch.images[0]


def test_transparency_is_composited_on_white(tmp_path: Path) -> None:
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[..., 0] = 200  # hidden red
    rgba[4:, :, 3] = 255
    pixels = pixels_of(tmp_path, encoded(Image.fromarray(rgba)))
    assert (pixels[:4] == 255).all()
    assert (pixels[4:] == [200, 0, 0]).all()


def test_palette_transparency_and_grey_alpha_are_composited_too(tmp_path: Path) -> None:
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 255, 9, 9, 9])
    palette.paste(0, (0, 0, 8, 4))
    pixels = pixels_of(tmp_path / "p", encoded(palette, transparency=1))
    assert (pixels[:4] == [0, 0, 255]).all()
    assert (pixels[4:] == 255).all()
    half = np.stack([np.zeros((8, 8)), np.full((8, 8), 128)], -1).astype(np.uint8)
    grey = pixels_of(tmp_path / "la", encoded(Image.fromarray(half, "LA")))
    np.testing.assert_allclose(grey, 127, atol=1)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    deep = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    pixels = pixels_of(tmp_path, encoded(Image.fromarray(deep)), channels=1)
    np.testing.assert_allclose(pixels[..., 0], deep / 257, atol=0.51)


@pytest.mark.parametrize(("kind", "ending"), [("JPEG", "jpg"), ("TIFF", "tif")])
def test_cmyk_becomes_rgb(tmp_path: Path, kind: str, ending: str) -> None:
    pixels = pixels_of(tmp_path, encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), kind), ending)
    np.testing.assert_allclose(pixels.mean((0, 1)), [255, 0, 0], atol=8)


def test_exif_orientation_is_applied_and_broken_exif_is_no_obstacle(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    raw = noise(1)
    pixels = pixels_of(tmp_path / "a", encoded(Image.fromarray(raw), exif=exif))
    np.testing.assert_array_equal(pixels, np.rot90(raw, -1))
    broken = encoded(Image.fromarray(raw), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    np.testing.assert_array_equal(pixels_of(tmp_path / "b", broken), raw)


def test_of_an_animation_the_first_frame_counts_and_one_bit_images_are_black_and_white(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (pixels_of(tmp_path / "gif", gif, "gif") == [255, 0, 0]).all()
    bits = Image.fromarray(np.eye(8) > 0)
    np.testing.assert_array_equal(pixels_of(tmp_path / "bit", encoded(bits), channels=1)[..., 0], np.eye(8) * 255)


def test_colours_become_grey_by_luma(tmp_path: Path) -> None:
    pixels = pixels_of(tmp_path, encoded(Image.new("RGB", (8, 8), (255, 0, 0))), channels=1)
    assert pixels.shape == (8, 8, 1)
    assert (pixels == 76).all()  # 0.299 of 255


@pytest.mark.faults
def test_resolution_takes_the_centre_square_antialiased(tmp_path: Path) -> None:
    wide = np.zeros((32, 64, 3), np.uint8)
    wide[:, 16:48] = 100
    wide[:, :16] = 255
    pixels = pixels_of(tmp_path / "wide", encoded(Image.fromarray(wide)), resolution=4)
    assert pixels.shape == (4, 4, 3)
    np.testing.assert_allclose(pixels[:, 1:3], 100, atol=2)
    checks = np.indices((64, 64)).sum(0) % 2 * 255
    small = pixels_of(tmp_path / "checks", encoded(Image.fromarray(checks.astype(np.uint8))), resolution=8)
    np.testing.assert_allclose(small[2:6, 2:6], 127.5, atol=4)  # without antialiasing: 0 or 255
    thin = pixels_of(tmp_path / "thin", encoded(Image.new("RGB", (4000, 1), "red")), resolution=8)
    assert (thin == [255, 0, 0]).all()


def test_images_that_are_not_square_need_a_resolution(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / f"{i}.png").write_bytes(encoded(Image.new("RGB", (9, 8))))
    with pytest.raises(StorageError, match=r"\d\.png: 9x8 pixels, not square; set images\.resolution"):
        folder(tmp_path)
    assert folder(tmp_path, resolution=8).split("train").read([0]).good.all()


def test_a_limit_is_spread_over_the_classes(tmp_path: Path) -> None:
    images = open_images(ImagesConfig(limit=25))
    for name in ("train", "test"):
        split = images.split(name)
        counts = np.bincount(split.labels)
        assert len(split) == 25
        assert counts.max() - counts.min() <= 1
    everything = open_images(ImagesConfig()).split("test")
    few = images.split("test")
    for row, key in enumerate(few.keys):
        original = everything.keys.index(key)
        assert everything.labels[original] == few.labels[row]
        np.testing.assert_array_equal(everything.read([original]).images[0], few.read([row]).images[0])
    class_folders(tmp_path, per_class=12)
    assert np.bincount(folder(tmp_path, limit=7).split("train").labels).tolist() == [4, 3]


def test_another_number_of_classes_than_configured_is_refused(tmp_path: Path) -> None:
    class_folders(tmp_path)
    assert folder(tmp_path, classes=2).classes == ["cat", "dog"]
    with pytest.raises(StorageError, match=r"has 2 classes, not images\.classes=10; "):
        folder(tmp_path, classes=10)


@pytest.mark.parametrize("layout", ["one file", "a folder"])
def test_npz_arrays_are_a_source(tmp_path: Path, layout: str) -> None:
    images = np.stack([noise(i, channels=1) for i in range(20)])
    labels = np.arange(20) % 2
    if layout == "one file":
        np.savez(tmp_path / "all.npz", images=images, labels=labels)
        source = open_images(ImagesConfig(source="npz", location=str(tmp_path / "all.npz"), test_fraction=0.2))
        assert [len(source.split(name)) for name in ("train", "test")] == [16, 4]
    else:
        np.savez_compressed(tmp_path / "train.npz", images=images, labels=labels)
        np.savez(tmp_path / "test.npz", images=images[:4], labels=labels[:4].astype(np.uint8))
        source = open_images(ImagesConfig(source="npz", location=str(tmp_path)))
        assert [len(source.split(name)) for name in ("train", "test")] == [20, 4]
    split = source.split("train")
    assert (source.channels, source.resolution, source.classes) == (1, 8, ["0", "1"])
    batch = split.read(range(len(split)))
    for row, key in enumerate(split.keys):
        np.testing.assert_array_equal(batch.images[row, ..., 0], images[int(key[-7:])])
        assert split.labels[row] == labels[int(key[-7:])]
    rgb = open_images(ImagesConfig(source="npz", location=str(source_path(tmp_path)), channels=3, resolution=4))
    assert rgb.split("test").read([0]).images.shape == (1, 4, 4, 3)


def source_path(folder: Path) -> Path:
    return folder / "all.npz" if (folder / "all.npz").exists() else folder


def test_torchvision_sets_are_read_from_a_local_root(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.stack([noise(i, 28, 1) for i in range(6)])
    for split, n in (("train", 6), ("t10k", 3)):
        header = bytes([0, 0, 8, 3]) + b"".join(int(k).to_bytes(4, "big") for k in (n, 28, 28))
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header + images[:n].tobytes())
        labels = bytes([0, 0, 8, 1]) + n.to_bytes(4, "big") + bytes(range(n))
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(labels)
    source = open_images(ImagesConfig(source="torchvision", location=str(tmp_path), dataset="FashionMNIST"))
    assert (source.channels, source.resolution, len(source.classes)) == (1, 28, 10)
    train = source.split("train")
    assert (len(train), len(source.split("test"))) == (6, 3)
    np.testing.assert_array_equal(train.read(range(6)).images[..., 0], images)
    assert train.labels.tolist() == list(range(6))
    assert train.keys[2] == "FashionMNIST/train/00002"


MISSING = {
    "no such folder": {"source": "folder", "location": "none"},
    "no images there": {"source": "folder", "location": "empty"},
    "read all of them without classes (images.labels=none)": {"source": "folder", "location": "mixed"},
    "not one image there is readable": {"source": "folder", "location": "garbage", "split": "stratified"},
    "alone in its class": {"source": "folder", "location": "single", "resolution": 8, "split": "stratified"},
    "by their names none is a test image": {"source": "folder", "location": "single", "test_fraction": 1e-9},
    "file.txt: no such folder": {"source": "folder", "location": "file.txt"},
    "unknown kind of location": {"source": "folder", "location": "http://images/x"},
    "arrays.npz: is a file of arrays, not a folder; set images.source=npz": {
        "source": "folder",
        "location": "arrays/arrays.npz",
    },
    "; .npz files are read with images.source=npz": {
        "source": "folder",
        "location": "arrays",
    },
    "train.npz: is missing": {"source": "npz", "location": "empty"},
    "finds no whole CIFAR10 there": {"source": "torchvision", "location": "empty"},
    "finds no whole FashionMNIST there": {"source": "torchvision", "location": "empty", "dataset": "FashionMNIST"},
}


@pytest.mark.parametrize("fault", MISSING)
def test_a_missing_source_is_one_line_with_the_fix(tmp_path: Path, fault: str) -> None:
    for name in ("empty/class", "mixed/a", "garbage/a", "single/a"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "arrays").mkdir()
    (tmp_path / "arrays" / "arrays.npz").write_bytes(b"x")
    for key in ("0.png", "a/0.png"):
        (tmp_path / "mixed" / key).write_bytes(encoded(Image.new("L", (8, 8))))
    (tmp_path / "single" / "a" / "0.png").write_bytes(encoded(Image.new("L", (8, 8))))
    for name in ("0.png", "1.png"):
        (tmp_path / "garbage" / "a" / name).write_bytes(b"garbage")
    config = dict(MISSING[fault])
    if "://" not in str(config["location"]):
        config["location"] = str(tmp_path / str(config["location"]))
    with pytest.raises(StorageError, match=re.escape(fault)) as error:
        open_images(ImagesConfig.model_validate(config))
    assert "\n" not in str(error.value)
    assert ";" in str(error.value)


def test_a_source_is_listed_once_inside_and_anew_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class_folders(tmp_path / "train", per_class=2)
    class_folders(tmp_path / "test", per_class=1)
    config = ImagesConfig(source="folder", location=str(tmp_path), resolution=8)
    listed = []
    real = LocalLocation.listing
    monkeypatch.setattr(LocalLocation, "listing", lambda self, prefix="": listed.append(prefix) or real(self, prefix))
    with listed_once():
        first = open_images(config)
        with listed_once(), ThreadPoolExecutor(1) as pool:
            assert pool.submit(copy_context().run, open_images, config).result() is first
        assert open_images(config.model_copy(update={"limit": 1})).split("test").keys == first.split("test").keys[:1]
    assert len(listed) == 2
    class_folders(tmp_path / "test", per_class=1, classes=("cow",))
    assert len(open_images(config).classes) == 3


def test_arrays_are_not_kept_in_memory_for_the_next_reader(tmp_path: Path) -> None:
    np.savez(tmp_path / "all.npz", images=np.zeros((20, 8, 8), np.uint8), labels=np.arange(20) % 2)
    config = ImagesConfig(source="npz", location=str(tmp_path / "all.npz"), test_fraction=0.5)
    with listed_once():
        assert open_images(config) is not open_images(config)
