"""A folder of images that is named in other words, or was moved, is no other config; one of other images is."""

from pathlib import Path

import pytest

from functa.flows.config.load import recorded_config
from functa.flows.ledger import Ledger, images_digest
from functa.storage.images.source import open_images
from functa.storage.runs.stage_records import StageConflict
from tests.helpers.flows.finished_stages import change_record, finish, ledger, recorded
from tests.helpers.storage.image_files import class_folders

PHOTOS = ("images.source=folder", "images.resolution=8", "images.channels=1")


def of_photos(root: Path, location: str) -> Ledger:
    return ledger(root, *PHOTOS, f"images.location={location}")


def finish_photos(root: Path, location: str) -> Ledger:
    book = of_photos(root, location)
    finish(book, "meta_train")
    finish(book, "encode", images_digest=images_digest(open_images(book.config.images)))
    return of_photos(root, location)


def record_location(book: Ledger, location: str) -> None:
    """Write the location into the records as an older version did."""
    for stage in ("meta_train", "encode"):
        change_record(book, stage, config=recorded(book, stage).config | {"images.location": location})


def test_a_relative_location_of_images_means_the_folder_that_it_was_typed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, folder in enumerate(("one", "two")):
        class_folders(tmp_path / folder / "pics", per_class=4 + number)
    monkeypatch.chdir(tmp_path / "one")
    finish_photos(tmp_path / "root", "pics")
    for same in ("pics", "pics/", "./pics", "../one/pics", str(tmp_path / "one/pics")):
        assert of_photos(tmp_path / "root", same).current("encode") is not None
    monkeypatch.chdir(tmp_path / "two")
    message = f"images.location: '{tmp_path}/one/pics' -> '{tmp_path}/two/pics'"
    with pytest.raises(StageConflict, match=message):
        of_photos(tmp_path / "root", "pics").up_to_date("meta_train")


def test_a_moved_folder_of_the_same_images_is_no_other_config(tmp_path: Path) -> None:
    class_folders(tmp_path / "pics", per_class=4)
    finish_photos(tmp_path / "root", str(tmp_path / "pics"))
    (tmp_path / "pics").rename(tmp_path / "moved")
    book = of_photos(tmp_path / "root", str(tmp_path / "moved"))
    assert book.current("meta_train") is not None
    assert book.current("encode") is not None
    next((tmp_path / "moved/cat").iterdir()).unlink()  # the move was recorded, and now images may change
    again = of_photos(tmp_path / "root", str(tmp_path / "moved"))
    assert again.current("meta_train") is not None
    assert again.up_to_date("encode") is not None
    assert again.current("encode") is None
    class_folders(tmp_path / "others", per_class=5)
    with pytest.raises(StageConflict, match=r"images\.location"):
        of_photos(tmp_path / "root", str(tmp_path / "others")).up_to_date("encode")


def test_a_location_that_an_older_version_recorded_as_typed_is_still_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class_folders(tmp_path / "pics", per_class=4)
    book = finish_photos(tmp_path / "root", str(tmp_path / "pics"))
    record_location(book, "pics/")
    monkeypatch.chdir(tmp_path)
    assert of_photos(tmp_path / "root", "pics").current("encode") is not None


@pytest.mark.parametrize("typed", ["{}/pics/", "file://{}/pics", "{}/./pics"])
def test_the_same_folder_in_other_words_is_no_other_config_whatever_was_added(typed: str, tmp_path: Path) -> None:
    class_folders(tmp_path / "pics", per_class=4)
    book = finish_photos(tmp_path / "root", str(tmp_path / "pics"))
    record_location(book, typed.format(tmp_path))
    class_folders(tmp_path / "pics/new", per_class=4, classes=("emu",))
    assert of_photos(tmp_path / "root", str(tmp_path / "pics")).up_to_date("encode") is not None


def test_a_root_of_an_older_version_names_the_setting_that_continues_it(tmp_path: Path) -> None:
    class_folders(tmp_path / "pics", per_class=4)
    book = finish_photos(tmp_path / "root", str(tmp_path / "pics"))
    for stage in ("meta_train", "encode"):
        record = recorded(book, stage)
        older = {key: value for key, value in record.config.items() if key != "images.split"}
        images = {key: value for key, value in record.pipeline["images"].items() if key != "split"}
        change_record(book, stage, config=older, pipeline=record.pipeline | {"images": images})
    with pytest.raises(StageConflict, match=r"None -> 'by_key'\): --set images.split=stratified continues it"):
        of_photos(tmp_path / "root", str(tmp_path / "pics")).up_to_date("encode")
    same = recorded_config(recorded(book, "encode"))
    assert Ledger(same, book.root).up_to_date("encode") is not None
