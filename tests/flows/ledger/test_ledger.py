"""The ledger decides which stages are up to date, what is refused, and where new output goes, from records alone."""

from pathlib import Path

import pytest

from functa.flows.cli.status import read_status
from functa.flows.ledger import MissingInput
from functa.storage.errors import StorageError
from functa.storage.runs.checkpoints import save_checkpoint
from functa.storage.runs.stage_records import StageConflict
from functa.tasks.dispatch.child import TrainingFailed
from functa.tasks.stage_table import STAGES
from tests.helpers.flows.finished_stages import WEIGHTS, finish, finish_all, ledger, recorded


def test_a_finished_root_is_up_to_date(tmp_path: Path) -> None:
    assert finish_all(tmp_path).all_up_to_date()
    assert not ledger(tmp_path / "other").all_up_to_date()


def test_a_stage_that_the_config_does_not_have_is_not_missed(tmp_path: Path) -> None:
    book = ledger(tmp_path, "classifier=null", "diffusion=null")
    for stage in ("meta_train", "encode", "evaluate"):
        finish(book, stage)
    assert book.all_up_to_date()
    assert book.up_to_date("train_classifier") is None
    assert book.inputs("evaluate") == {"meta_train": "feed", "encode": "feed"}
    assert read_status(str(tmp_path))["stages"] == dict.fromkeys(("meta_train", "encode", "evaluate"), "finished")
    added = ledger(tmp_path, "diffusion=null")  # a classifier asked for later
    assert not added.all_up_to_date()
    finish(added, "train_classifier")
    assert [stage for stage in STAGES if added.up_to_date(stage)] == ["meta_train", "encode", "train_classifier"]
    assert read_status(str(tmp_path))["stages"]["train_classifier"] == "finished"


def test_an_unfinished_or_other_checkpoint_is_not_up_to_date(tmp_path: Path) -> None:
    book = finish_all(tmp_path)
    field = book.location.child("checkpoints", "field")
    save_checkpoint(field, 6, WEIGHTS, {"finished": False})
    assert book.up_to_date("meta_train") is None
    save_checkpoint(field, 7, WEIGHTS, {"finished": True, "weights_digest": "beef"})
    assert book.up_to_date("meta_train") is None


def test_a_truncated_checkpoint_is_not_up_to_date(tmp_path: Path) -> None:
    book = finish_all(tmp_path)
    (tensors,) = (tmp_path / "checkpoints" / "field").glob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-1])
    assert book.up_to_date("meta_train") is None


@pytest.mark.parametrize("missing", ["metrics.json", "report.html", "runs"])
def test_a_report_without_one_of_its_parts_is_not_up_to_date(missing: str, tmp_path: Path) -> None:
    book = finish_all(tmp_path)
    path = tmp_path / missing
    path.unlink() if path.is_file() else path.rename(tmp_path / "elsewhere")
    assert book.up_to_date("evaluate") is None


def test_existing_output_of_another_config_is_refused_by_its_keys(tmp_path: Path) -> None:
    finish_all(tmp_path)
    with pytest.raises(StageConflict, match=r"classifier.steps: 600 -> 700.*another --root"):
        ledger(tmp_path, "classifier.steps=700").up_to_date("train_classifier")


@pytest.mark.faults
def test_half_trained_work_of_another_config_is_refused_too(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    with pytest.raises(KeyboardInterrupt), book.working("meta_train"):
        save_checkpoint(book.location.child("checkpoints", "field"), 5, WEIGHTS, {"finished": False})
        raise KeyboardInterrupt
    assert recorded(book, "meta_train").state == "interrupted"
    with pytest.raises(StageConflict):
        ledger(tmp_path, "field.width=32").up_to_date("meta_train")


@pytest.mark.parametrize(
    "error",
    [
        StorageError("the disk is full"),
        OSError(28, "No space left on device"),
        TrainingFailed("lost the connection", may_pass=True),
        TrainingFailed("the disk is full", may_pass=False),
    ],
)
def test_half_trained_work_that_an_outside_fault_ended_is_refused_to_another_config(
    error: Exception, tmp_path: Path
) -> None:
    """Its checkpoints are good, and the training of another config would begin with deleting them."""
    book = ledger(tmp_path)
    with pytest.raises(type(error)), book.working("meta_train"):
        save_checkpoint(book.location.child("checkpoints", "field"), 5, WEIGHTS, {"finished": False})
        raise error
    assert recorded(book, "meta_train").state == "failed"
    with pytest.raises(StageConflict, match=r"field.width: 64 -> 32.*another --root"):
        ledger(tmp_path, "field.width=32").up_to_date("meta_train")
    assert ledger(tmp_path).up_to_date("meta_train") is None  # the same one goes on


def test_what_was_deleted_or_diverged_may_be_made_with_another_config(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    with pytest.raises(TrainingFailed, match="diverged"), book.working("meta_train"):
        save_checkpoint(book.location.child("checkpoints", "field"), 5, WEIGHTS, {"finished": False})
        raise TrainingFailed("it diverged:\n lower learning_rate", may_pass=False, by_config=True)
    record = recorded(book, "meta_train")
    assert (record.state, record.error) == ("failed", "it diverged: lower learning_rate")
    assert ledger(tmp_path, "meta_train.learning_rate=1e-4").up_to_date("meta_train") is None
    finish(ledger(tmp_path, "meta_train.learning_rate=1e-4"), "meta_train")
    (tmp_path / "checkpoints" / "field").rename(tmp_path / "moved")
    assert ledger(tmp_path, "field.width=32").up_to_date("meta_train") is None


def test_stages_after_a_changed_input_are_not_up_to_date(tmp_path: Path) -> None:
    book = finish_all(tmp_path)
    (tmp_path / "functaset.zarr").rename(tmp_path / "moved")
    finish(book, "encode", digest="beef")
    assert [s for s in ("train_classifier", "train_diffusion", "evaluate") if book.up_to_date(s)] == []


def test_a_resumed_evaluation_keeps_its_folder_and_a_new_one_gets_a_new_folder(tmp_path: Path) -> None:
    book = finish_all(tmp_path)
    folder = recorded(book, "evaluate").output
    with book.working("evaluate") as record:
        assert record.output == folder
    other = ledger(tmp_path, "diffusion.process.guidance=2")
    (tmp_path / "runs").rename(tmp_path / "moved")
    with other.working("evaluate") as record:
        assert record.output.startswith("runs/")
        assert record.output != folder


def test_a_stage_without_its_input_names_the_command_to_run(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="run `functa meta-train digits` first"):
        ledger(tmp_path).require_inputs("encode")
    with pytest.raises(MissingInput, match="run `functa encode digits` first"):
        finish(book := ledger(tmp_path), "meta_train")
        book.require_inputs("train_diffusion")
