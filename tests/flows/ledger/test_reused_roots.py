"""Stages that are reused from another root: where they agree, and as that root has them now."""

from pathlib import Path

import pytest

from functa.flows.ledger import MissingInput
from functa.storage.runs.checkpoints import save_checkpoint
from tests.helpers.flows.finished_stages import WEIGHTS, finish, finish_all, ledger


def test_stages_of_another_root_are_reused_only_where_they_agree(tmp_path: Path) -> None:
    finish_all(tmp_path / "a")
    book = ledger(tmp_path / "b", "classifier.steps=700", from_root=tmp_path / "a")
    assert book.output(book.require("encode")) == str(tmp_path / "a" / "functaset.zarr")
    assert book.up_to_date("train_classifier") is None
    assert book.up_to_date("train_diffusion") is not None
    field = ledger(tmp_path / "a").location.child("checkpoints", "field")
    save_checkpoint(field, 6, WEIGHTS, {"finished": True, "weights_digest": "beef"})
    assert book.up_to_date("meta_train") is None  # the other root has trained again: its field has changed


def test_a_root_sees_later_commits_of_the_functaset_that_it_reuses(tmp_path: Path) -> None:
    other = finish_all(tmp_path / "other")
    ledger(tmp_path / "mine", from_root=tmp_path / "other").all_up_to_date()
    finish(other, "encode", "beef", info={"version": 2})
    for book in (ledger(tmp_path / "mine"), ledger(tmp_path / "mine", from_root=tmp_path / "other")):
        record = book.up_to_date("encode")
        assert record is not None
        assert (record.output_digest, record.figures["info"]) == ("beef", {"version": 2})
        assert book.output(record) == str(tmp_path / "other" / "functaset.zarr")


def test_what_another_root_encoded_is_repaired_there(tmp_path: Path) -> None:
    finish_all(tmp_path / "other")
    book = ledger(tmp_path / "mine", from_root=tmp_path / "other")
    assert book.up_to_date("encode") is not None
    with pytest.raises(MissingInput, match=r"its encode is in .*/other/functaset\.zarr; name the root of that"):
        book.require_begun("encode")
    with book.working("encode") as record:
        assert record.output == "functaset.zarr"
        assert record.output_digest == ""


def test_a_root_to_reuse_from_must_hold_a_run(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="no run has been started there"):
        ledger(tmp_path / "a", from_root=tmp_path / "nowhere")
