"""Images that are missing from the source: many of them end an encoding before it changes anything."""

from pathlib import Path

import pytest

from functa.storage.errors import StorageError
from functa.tasks.encoding.plan import plan
from tests.helpers.tasks.changing_source import job_on_source, planned_images, stored_codes, write_image, write_source
from tests.helpers.tasks.encoding import encode, file_bytes


@pytest.mark.parametrize("lost", ["train/a", "train/b", "all of train/a but one"])
def test_many_missing_images_end_an_encoding_before_it_changes_anything(field: Path, tmp_path: Path, lost: str) -> None:
    """A network share that is not mounted looks like an empty or missing folder."""
    write_source(tmp_path / "x")
    work = job_on_source(field, tmp_path)
    encode(work)
    before = file_bytes(tmp_path / "s")
    folder = tmp_path / "x" / ("train/a" if "but" in lost else lost)
    missing = sorted(folder.iterdir())["but" in lost :]
    aside = tmp_path / "aside"
    aside.mkdir()
    for path in missing:
        path.rename(aside / path.name)
    with pytest.raises(
        StorageError, match=rf"x: {len(missing)} of 36 encoded images are missing .*--retire-lost"
    ) as error:
        plan(work)
    assert "\n" not in str(error.value)
    assert file_bytes(tmp_path / "s") == before
    for path in missing:
        (aside / path.name).rename(path)
    assert planned_images(work) == 0
    for path in missing:
        path.unlink()
    result = encode(work.model_copy(update={"retire_lost": True}))
    assert result["info"]["rows"] == 36 - len(missing)
    assert planned_images(work) == 0


def test_a_missing_class_must_be_confirmed_however_small_it_is(field: Path, tmp_path: Path) -> None:
    write_source(tmp_path / "x")
    write_image(tmp_path / "x", "train/0/one.png", 55)
    write_image(tmp_path / "x", "test/0/one.png", 56)
    work = job_on_source(field, tmp_path)
    encode(work)
    (tmp_path / "x/train/0/one.png").unlink()  # without it every label changes
    with pytest.raises(StorageError, match=r"1 of 38 .*train/0/one\.png\), all of a class of split 'train' among them"):
        plan(work)
    result = encode(work.model_copy(update={"retire_lost": True}))
    assert result["info"]["rows_by_split"] == {"train": 30, "test": 7}


def test_images_that_moved_to_the_other_split_or_beyond_the_limit_are_not_missing(field: Path, tmp_path: Path) -> None:
    write_source(tmp_path / "x")
    work = job_on_source(field, tmp_path, "images.limit=12")
    encode(work)
    for i in range(12):  # they sort first in their classes, so the limit excludes others
        write_image(tmp_path / "x", f"train/{'ab'[i % 2]}/+{i:03d}.png", 700 + i)
    result = encode(work)
    assert result["info"]["rows_by_split"] == {"train": 12, "test": 6}
    assert all("+" in key for key, _ in stored_codes(tmp_path))
    for i in range(40):
        write_image(tmp_path / "y" / "x", f"{'ab'[i % 2]}/{i:03d}.png", i)
    border = job_on_source(field, tmp_path / "y", "images.test_fraction=0.5")
    encode(border)
    for i in range(40, 90):
        write_image(tmp_path / "y" / "x", f"{'ab'[i % 2]}/{i:03d}.png", i)
    assert encode(border)["info"]["rows"] == 90


@pytest.mark.parametrize("what", ["the folder", "all images", "train"])
def test_a_missing_source_retires_nothing(field: Path, tmp_path: Path, what: str) -> None:
    write_source(tmp_path / "x")
    work = job_on_source(field, tmp_path)
    encode(work)
    before = file_bytes(tmp_path / "s")
    where = {"the folder": "x", "all images": "x/*", "train": "x/train"}[what]
    for path in sorted(tmp_path.glob(where)):
        path.rename(tmp_path / f"away-{path.name}")
    for lost in (False, True):  # retiring everything is never intended
        with pytest.raises(StorageError, match=r"x: .*;"):
            plan(work.model_copy(update={"retire_lost": lost}))
    assert file_bytes(tmp_path / "s") == before
