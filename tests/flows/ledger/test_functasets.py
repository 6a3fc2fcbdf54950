"""The functaset that an encoding goes on with, when one is up to date, and the models that it leaves so."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from functa.flows.cli.status import read_status
from functa.flows.jobs import stale_models
from functa.flows.ledger import Ledger, MissingInput, encode_fingerprint, images_digest
from functa.storage.errors import DamagedObject, StorageError
from functa.storage.functaset.header import create_functaset
from functa.storage.images.source import open_images
from functa.storage.places.address import open_location
from functa.storage.runs.stage_records import StageConflict
from tests.helpers.flows.finished_stages import change_record, finish, finish_all, ledger, recorded
from tests.helpers.storage.functasets import FIELD, new_store


def test_another_encoding_goes_beside_a_failed_one(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    finish(book, "meta_train")
    with pytest.raises(StorageError), book.working("encode") as record:
        new_store(book.location.child(record.output).uri)
        raise StorageError("too much is clipped: change encode.quantization.range")
    other = ledger(tmp_path, "encode.quantization.range=minmax", "encode.quantization.margin=0.5")
    assert other.up_to_date("encode") is None
    with other.working("encode") as record:
        assert record.output.startswith("functaset-")


def test_a_field_with_other_weights_gets_a_functaset_of_its_own(tmp_path: Path) -> None:
    book = finish_all(tmp_path)
    finish(book, "meta_train", digest="beef")
    assert book.up_to_date("encode") is None
    with book.working("encode") as record:
        assert record.output.startswith("functaset-")
        first = record.output
    with book.working("encode") as record:
        assert record.output == first  # the same work goes on where it began
    assert (tmp_path / "functaset.zarr" / "zarr.json").exists()


def test_a_functaset_of_the_same_choices_is_found_again_after_another_encoding(tmp_path: Path) -> None:
    book = finish_all(tmp_path)
    place = tmp_path / "functaset.zarr"
    (place / "zarr.json").unlink()
    create_functaset(open_location(str(place)), encode_fingerprint(book), FIELD, {}, "feed")
    other = ledger(tmp_path, "encode.quantization.bits=5")
    change_record(other, "encode", state="failed")
    with pytest.raises(StorageError), other.working("encode") as record:
        assert record.output.startswith("functaset-")
        raise StorageError("the disk is full")
    with book.working("encode") as record:
        assert record.output == "functaset.zarr"


def test_an_encoding_is_current_while_its_images_are_the_same(tmp_path: Path) -> None:
    pixels = np.zeros((12, 4, 4), np.uint8)

    def put(n: int) -> None:
        np.savez(tmp_path / "x.npz", images=pixels[:n], labels=np.arange(n) % 2)

    put(10)
    book = ledger(tmp_path / "root", "images.source=npz", f"images.location={tmp_path / 'x.npz'}")
    for stage in ("meta_train", "encode"):
        finish(book, stage)
    change_record(book, "encode", figures={"images_digest": images_digest(open_images(book.config.images))})

    def current() -> bool:
        return Ledger(book.config, book.root).current("encode") is not None

    assert current()
    put(12)
    assert not current()
    assert book.up_to_date("encode") is not None  # what was trained on it is not touched by that
    (tmp_path / "x.npz").unlink()
    assert current()  # unreadable images do not start a new encoding
    with pytest.raises(StorageError, match=r"x\.npz.*: is missing"):  # must_ask reports it
        Ledger(book.config, book.root).current("encode", must_ask=True)


@pytest.mark.parametrize("error", [StorageError("the disk is full"), KeyboardInterrupt()])
def test_a_functaset_is_up_to_date_after_adding_images_has_failed(error: BaseException, tmp_path: Path) -> None:
    book = finish_all(tmp_path)
    before = recorded(book, "encode")
    with pytest.raises(type(error)), book.working("encode"):
        assert book.up_to_date("encode") is not None  # what it held before can be read meanwhile
        raise error
    after = recorded(book, "encode")
    assert (after.state, after.output_digest, after.figures) == ("finished", before.output_digest, before.figures)
    message = str(error) or type(error).__name__
    assert after.error == message
    assert read_status(book.root)["errors"] == {"encode": message}
    assert book.all_up_to_date()
    # Killed at it, and failed the next time.
    change_record(book, "encode", state="running", owner="")
    with pytest.raises(type(error)), book.working("encode"):
        raise error
    assert book.all_up_to_date()


def test_only_what_was_begun_with_the_same_config_is_repaired(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="encode has not been run there"):
        ledger(tmp_path).require_begun("encode")
    book = finish_all(tmp_path)
    book.require_begun("encode")
    change_record(book, "encode", state="failed")
    book.require_begun("encode")
    with pytest.raises(StageConflict, match=r"encode.quantization.bits: 8 -> 5"):
        ledger(tmp_path, "encode.quantization.bits=5").require_begun("encode")


@pytest.mark.parametrize("what", ["commits/00000001.json", "zarr.json"])
def test_a_functaset_with_damaged_records_raises(tmp_path: Path, what: str) -> None:
    book = finish_all(tmp_path)
    path = tmp_path / "functaset.zarr" / what
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(StorageError, match=what):
        book.up_to_date("encode")


def test_a_later_commit_of_the_same_choices_and_classes_does_not_invalidate_a_model(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    finish(book, "meta_train")
    finish(book, "encode", "one", choices="c", info={"version": 1})
    for stage in ("train_classifier", "train_diffusion"):
        finish(book, stage, commit=1)
    finish(book, "evaluate")
    assert book.all_up_to_date()
    finish(book, "encode", "two", choices="c", info={"version": 2})
    classifier = book.up_to_date("train_classifier")
    assert classifier is not None
    assert book.up_to_date("train_diffusion") is not None
    assert book.up_to_date("evaluate") is None  # other rows, other figures
    note = book.newer_commit_note(classifier)
    assert re.fullmatch(r" \(trained on commit 1 of the functaset, which has 2; delete .*/classifier .*\)", note)
    assert stale_models(book) == []
    finish(book, "encode", "three", choices="other classes", info={"version": 3})
    assert stale_models(book) == ["train_classifier", "train_diffusion"]


def test_a_functaset_with_fewer_commits_than_its_root_recorded_is_damaged(tmp_path: Path) -> None:
    """Nothing beside the commits shows that there was another, as in functasets of older versions."""
    book = ledger(tmp_path)
    finish(book, "meta_train")
    finish(book, "encode", info={"version": 2})
    shutil.rmtree(tmp_path / "functaset.zarr" / "versions")
    for path in (tmp_path / "functaset.zarr" / "commits").glob("00000002.*"):
        path.unlink()
    with pytest.raises(DamagedObject, match=r"commits/00000002\.json: is missing; restore it from a copy"):
        book.up_to_date("encode")
    assert read_status(str(tmp_path))["stages"]["encode"] == "damaged"
