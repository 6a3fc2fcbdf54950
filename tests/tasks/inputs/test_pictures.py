"""Training images: unreadable ones never reach a batch, and a batch reports the rows that it holds."""

from pathlib import Path

import numpy as np
import pytest
import torch

from functa.storage.config import ImagesConfig
from functa.storage.errors import StorageError
from functa.storage.images.source import open_images
from functa.tasks.inputs import pictures
from functa.tasks.inputs.pictures import Pictures, as_float, pinned, refuse_too_many_bad
from functa.tasks.training.ranks import Ranks
from tests.helpers.storage.image_files import class_folders


@pytest.fixture
def on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MEMORY_BYTES", 10)


def opened(folder: Path, spoilt: tuple[int, ...] = (), limit: int | None = None, **changes: float) -> Pictures:
    """40 images of two classes, of which the training rows `spoilt` are no images."""
    class_folders(folder, per_class=24)
    config = ImagesConfig(source="folder", split="stratified", location=str(folder), **changes)
    images = open_images(config)
    for row in spoilt:
        (folder / images.split("train").keys[row]).write_bytes(b"spoilt")
    return Pictures(images, "train", config, limit=limit)


def label_of(key: str) -> int:
    return ("cat", "dog").index(key.split("/")[0])


@pytest.mark.parametrize("spoilt", [(), (3, 30)])
def test_in_memory_and_on_demand_give_the_same_pixels_of_the_same_keys(
    tmp_path: Path, spoilt: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = opened(tmp_path, spoilt, max_bad_fraction=0.5)
    by_key = dict(zip(held.keys, held.read(np.arange(len(held)))[0]))
    monkeypatch.setattr(pictures, "MEMORY_BYTES", 10)
    config = ImagesConfig(
        source="folder", split="stratified", location=str(tmp_path), resolution=8, max_bad_fraction=0.5
    )
    read = Pictures(open_images(config), "train", config)
    pixels, used = read.read(np.arange(len(read)))
    assert len(pixels) == len(used) == len(read) == len(held) + len(spoilt)
    for image, row in zip(pixels, used):
        np.testing.assert_array_equal(image, by_key[read.keys[row]])
        assert read.labels[row] == label_of(read.keys[row])
    assert set(spoilt).isdisjoint(used)


def test_on_demand_a_replaced_row_has_the_label_of_its_pixels(tmp_path: Path, on_demand: None) -> None:
    training = opened(tmp_path, spoilt=(3,), max_bad_fraction=0.5)
    other = int(np.flatnonzero(training.labels != training.labels[3])[0])
    pixels, used = training.read(np.array([3, other]))
    assert list(used) == [other, other]
    np.testing.assert_array_equal(pixels[0], pixels[1])
    torch.testing.assert_close(training.batch(np.array([3, other])), as_float(pixels), rtol=0, atol=0)


def test_in_memory_a_batch_holds_the_requested_rows(tmp_path: Path) -> None:
    training = opened(tmp_path, spoilt=(3,), max_bad_fraction=0.5)
    rows = np.array([5, 2, 2])
    pixels, used = training.read(rows)
    np.testing.assert_array_equal(used, rows)
    np.testing.assert_array_equal(pixels[1], pixels[2])


@pytest.mark.faults
def test_too_many_bad_images_of_a_whole_split_are_refused(tmp_path: Path) -> None:
    fault = r"4 of 40 train images cannot be used, .*=0\.04 allows; the first: (cat|dog)/\S+\.png: does"
    fix = r"; repair or remove them, or allow this many: --set images\.max_bad_fraction=0\.1$"
    with pytest.raises(StorageError, match=f"{fault}.*{fix}"):
        opened(tmp_path, spoilt=(3, 5, 30, 31), max_bad_fraction=0.04)


def test_the_fix_that_the_message_names_is_enough(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as refused:
        opened(tmp_path, spoilt=(3, 5, 7, 30, 31, 32, 33), max_bad_fraction=0.01)
    enough = float(str(refused.value).rpartition("=")[2])
    config = ImagesConfig(source="folder", split="stratified", location=str(tmp_path), max_bad_fraction=enough)
    assert len(Pictures(open_images(config), "train", config)) == 33


@pytest.mark.parametrize(
    ("rows", "limit", "allowed"),
    [(55, 0.01, 3), (30, 0.01, 3), (29, 0.01, 1), (2, 0.01, 1), (1, 0.01, 0), (1000, 0.01, 10), (55, 0.0, 0)],
)
def test_a_few_bad_images_always_pass_but_never_all_and_with_zero_none(rows: int, limit: float, allowed: int) -> None:
    refuse_too_many_bad(allowed, rows, limit, "train", "")
    with pytest.raises(StorageError):
        refuse_too_many_bad(allowed + 1, rows, limit, "train", "")


def test_one_bad_image_of_a_small_subset_is_allowed(tmp_path: Path) -> None:
    training = opened(tmp_path, spoilt=(0,), limit=8, max_bad_fraction=0.01)
    assert len(training) == len(training.labels) == len(training.keys) == 7


def test_on_demand_too_many_bad_images_are_refused_and_each_is_counted_once(tmp_path: Path, on_demand: None) -> None:
    training = opened(tmp_path, spoilt=(3, 5, 7, 30), max_bad_fraction=0.04)
    for _ in range(3):
        training.batch(np.array([2, 3, 5, 7]))
    with pytest.raises(StorageError, match="4 of 40 train images cannot be used"):
        training.batch(np.array([30, 31]))


def test_a_batch_without_a_readable_image_is_refused(tmp_path: Path, on_demand: None) -> None:
    training = opened(tmp_path, spoilt=(3, 30), max_bad_fraction=1.0)
    with pytest.raises(
        StorageError, match=r"none of 2 train images could be read; the first: cat/\S+\.png: does not decode"
    ):
        training.batch(np.array([3, 30]))


def test_processes_that_share_a_batch_hold_the_same_images_as_one_process(tmp_path: Path, on_demand: None) -> None:
    """Even if all of a process's part is unreadable, or the batch begins with a bad row."""
    first = opened(tmp_path, spoilt=(3, 30), max_bad_fraction=0.5)
    config = ImagesConfig(
        source="folder", split="stratified", location=str(tmp_path), resolution=8, max_bad_fraction=0.5
    )
    for rows in ([3, 7, 8, 5, 30, 9], [5, 7, 8, 9, 3, 30], [30, 3, 3, 8, 30, 9]):
        pixels, used = first.read(np.array(rows))
        for world in (2, 3):
            parts = []
            for rank in range(world):
                other = Pictures(open_images(config), "train", config)
                parts.append(other.read(np.array(rows), Ranks(rank, world).part(len(rows))))
            np.testing.assert_array_equal(np.concatenate([part for part, _ in parts]), pixels)
            np.testing.assert_array_equal(np.concatenate([rows for _, rows in parts]), used)


def test_the_digest_identifies_the_rows_that_are_kept(tmp_path: Path) -> None:
    whole = opened(tmp_path)
    config = ImagesConfig(source="folder", split="stratified", location=str(tmp_path), max_bad_fraction=0.5)
    assert Pictures(open_images(config), "train", config).digest == whole.digest
    digests = {whole.digest}
    for row in (3, 30):
        images = open_images(config)
        path = tmp_path / images.split("train").keys[row]
        kept = path.read_bytes()
        path.write_bytes(b"spoilt")
        digests.add(Pictures(images, "train", config).digest)  # of one length, with another row left out
        path.write_bytes(kept)
    assert len(digests) == 3


def test_bytes_become_on_the_device_what_they_became_on_the_host() -> None:
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    expected = torch.from_numpy(every).float() / 255
    for pixels in (every, torch.from_numpy(every), pinned(every, torch.device("cpu"))):
        found = as_float(pixels, torch.device("cpu"))
        assert found.dtype == torch.float32 and torch.equal(found, expected)
