"""The ledger decides which stages are up to date, what is refused, and where new output goes, from records alone."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from functa.flows.cli.status import read_status
from functa.flows.config.load import recorded_config
from functa.flows.jobs import stale_models
from functa.flows.ledger import Ledger, MissingInput, encode_fingerprint, images_digest
from functa.storage.errors import StorageError
from functa.storage.functaset.header import create_functaset
from functa.storage.images.source import open_images
from functa.storage.places.address import open_location
from functa.storage.runs.checkpoints import save_checkpoint
from functa.storage.runs.stage_records import StageConflict, read_record, write_record
from functa.tasks.dispatch.child import TrainingFailed
from functa.tasks.stage_table import STAGES
from tests.helpers.flows.finished_stages import WEIGHTS, config, finish, finish_all, ledger
from tests.helpers.storage.functasets import FIELD, new_store
from tests.helpers.storage.image_files import class_folders


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


def test_half_trained_work_of_another_config_is_refused_too(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    with pytest.raises(KeyboardInterrupt), book.working("meta_train"):
        save_checkpoint(book.location.child("checkpoints", "field"), 5, WEIGHTS, {"finished": False})
        raise KeyboardInterrupt
    assert read_record(book.location, "meta_train").state == "interrupted"  # type: ignore[union-attr]
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
    assert read_record(book.location, "meta_train").state == "failed"  # type: ignore[union-attr]
    with pytest.raises(StageConflict, match=r"field.width: 64 -> 32.*another --root"):
        ledger(tmp_path, "field.width=32").up_to_date("meta_train")
    assert ledger(tmp_path).up_to_date("meta_train") is None  # the same one goes on


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


def test_what_was_deleted_or_diverged_may_be_made_with_another_config(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    with pytest.raises(TrainingFailed, match="diverged"), book.working("meta_train"):
        save_checkpoint(book.location.child("checkpoints", "field"), 5, WEIGHTS, {"finished": False})
        raise TrainingFailed("it diverged:\n lower learning_rate", may_pass=False, by_config=True)
    record = read_record(book.location, "meta_train")
    assert record is not None
    assert (record.state, record.error) == ("failed", "it diverged: lower learning_rate")
    assert ledger(tmp_path, "meta_train.learning_rate=1e-4").up_to_date("meta_train") is None
    finish(ledger(tmp_path, "meta_train.learning_rate=1e-4"), "meta_train")
    (tmp_path / "checkpoints" / "field").rename(tmp_path / "moved")
    assert ledger(tmp_path, "field.width=32").up_to_date("meta_train") is None


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
    record = read_record(other.location, "encode")
    assert record is not None
    write_record(other.location, record.model_copy(update={"state": "failed"}))
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
    record = read_record(book.location, "encode")
    assert record is not None
    write_record(
        book.location,
        record.model_copy(update={"figures": {"images_digest": images_digest(open_images(book.config.images))}}),
    )

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
    before = read_record(book.location, "encode")
    with pytest.raises(type(error)), book.working("encode"):
        assert book.up_to_date("encode") is not None  # what it held before can be read meanwhile
        raise error
    after = read_record(book.location, "encode")
    assert before is not None
    assert after is not None
    assert (after.state, after.output_digest, after.figures) == ("finished", before.output_digest, before.figures)
    message = str(error) or type(error).__name__
    assert after.error == message
    assert read_status(book.root)["errors"] == {"encode": message}
    assert book.all_up_to_date()
    # Killed at it, and failed the next time.
    write_record(book.location, after.model_copy(update={"state": "running", "owner": ""}))
    with pytest.raises(type(error)), book.working("encode"):
        raise error
    assert book.all_up_to_date()


def test_what_another_root_encoded_is_repaired_there(tmp_path: Path) -> None:
    finish_all(tmp_path / "other")
    book = ledger(tmp_path / "mine", from_root=tmp_path / "other")
    assert book.up_to_date("encode") is not None
    with pytest.raises(MissingInput, match=r"its encode is in .*/other/functaset\.zarr; name the root of that"):
        book.require_begun("encode")
    with book.working("encode") as record:
        assert record.output == "functaset.zarr"
        assert record.output_digest == ""


def test_only_what_was_begun_with_the_same_config_is_repaired(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="encode has not been run there"):
        ledger(tmp_path).require_begun("encode")
    book = finish_all(tmp_path)
    book.require_begun("encode")
    record = read_record(book.location, "encode")
    assert record is not None
    write_record(book.location, record.model_copy(update={"state": "failed"}))
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


def test_stages_after_a_changed_input_are_not_up_to_date(tmp_path: Path) -> None:
    book = finish_all(tmp_path)
    (tmp_path / "functaset.zarr").rename(tmp_path / "moved")
    finish(book, "encode", digest="beef")
    assert [s for s in ("train_classifier", "train_diffusion", "evaluate") if book.up_to_date(s)] == []


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


def test_a_root_sees_later_commits_of_the_functaset_that_it_reuses(tmp_path: Path) -> None:
    other = finish_all(tmp_path / "other")
    ledger(tmp_path / "mine", from_root=tmp_path / "other").all_up_to_date()
    finish(other, "encode", "beef", info={"version": 2})
    for book in (ledger(tmp_path / "mine"), ledger(tmp_path / "mine", from_root=tmp_path / "other")):
        record = book.up_to_date("encode")
        assert record is not None
        assert (record.output_digest, record.figures["info"]) == ("beef", {"version": 2})
        assert book.output(record) == str(tmp_path / "other" / "functaset.zarr")


def test_a_resumed_evaluation_keeps_its_folder_and_a_new_one_gets_a_new_folder(tmp_path: Path) -> None:
    book = finish_all(tmp_path)
    folder = read_record(book.location, "evaluate").output  # type: ignore[union-attr]
    with book.working("evaluate") as record:
        assert record.output == folder
    other = ledger(tmp_path, "diffusion.process.guidance=2")
    (tmp_path / "runs").rename(tmp_path / "moved")
    with other.working("evaluate") as record:
        assert record.output.startswith("runs/")
        assert record.output != folder


def test_stages_of_another_root_are_reused_only_where_they_agree(tmp_path: Path) -> None:
    finish_all(tmp_path / "a")
    book = ledger(tmp_path / "b", "classifier.steps=700", from_root=tmp_path / "a")
    assert book.output(book.require("encode")) == str(tmp_path / "a" / "functaset.zarr")
    assert book.up_to_date("train_classifier") is None
    assert book.up_to_date("train_diffusion") is not None
    save_checkpoint(
        Ledger(config(), str(tmp_path / "a")).location.child("checkpoints", "field"), 6, WEIGHTS,
        {"finished": True, "weights_digest": "beef"},
    )  # fmt: skip
    assert book.up_to_date("meta_train") is None  # the other root has trained again: its field has changed


def test_a_root_to_reuse_from_must_hold_a_run(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="no run has been started there"):
        ledger(tmp_path / "a", from_root=tmp_path / "nowhere")


def test_a_stage_without_its_input_names_the_command_to_run(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="run `functa meta-train digits` first"):
        ledger(tmp_path).require_inputs("encode")
    with pytest.raises(MissingInput, match="run `functa encode digits` first"):
        finish(book := ledger(tmp_path), "meta_train")
        book.require_inputs("train_diffusion")


def test_two_processes_do_not_work_at_one_stage(tmp_path: Path) -> None:
    code = (
        "import sys, time; from functa.flows.config.load import load_config; from functa.flows.ledger import Ledger\n"
        "with Ledger(load_config('digits'), sys.argv[1]).working('meta_train'):\n"
        "    print('at work', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout
    assert other.stdout.readline() == "at work\n"
    with (
        pytest.raises(StorageError, match=f"process {other.pid} is at meta-train"),
        ledger(tmp_path).working("meta_train"),
    ):
        pass
    other.kill()
    other.wait()
    finish(ledger(tmp_path), "meta_train")  # a killed one is in nobody's way


BEGIN = """
import sys, time
from functa.flows.config.load import load_config
from functa.flows.ledger import Ledger
from functa.storage.errors import StorageError
ledger = Ledger(load_config("digits"), sys.argv[1])
print("ready", flush=True)
input()
try:
    with ledger.working("meta_train"):
        print("entered", flush=True)
        input()
except StorageError as error:
    print(error, flush=True)
"""


def test_of_commands_that_begin_a_stage_at_the_same_moment_one_enters(tmp_path: Path) -> None:
    several = [
        subprocess.Popen(
            [sys.executable, "-c", BEGIN, str(tmp_path)],
            cwd=Path(__file__).parents[2], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(4)
    ]  # fmt: skip
    assert {process.stdout.readline() for process in several if process.stdout} == {"ready\n"}
    for process in several:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    answers = [process.stdout.readline() for process in several if process.stdout]
    for process in several:
        process.communicate("\n")
    assert answers.count("entered\n") == 1
    assert sum("is at meta-train there since" in answer for answer in answers) == 3


PHOTOS = ("images.source=folder", "images.resolution=8", "images.channels=1")


def of_photos(root: Path, location: str) -> Ledger:
    return ledger(root, *PHOTOS, f"images.location={location}")


def finish_photos(root: Path, location: str) -> None:
    book = of_photos(root, location)
    finish(book, "meta_train")
    finish(book, "encode", images_digest=images_digest(open_images(book.config.images)))


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
    finish_photos(tmp_path / "root", str(tmp_path / "pics"))
    book = of_photos(tmp_path / "root", str(tmp_path / "pics"))
    for stage in ("meta_train", "encode"):
        record = read_record(book.location, stage)
        assert record is not None
        typed = record.config | {"images.location": "pics/"}
        write_record(book.location, record.model_copy(update={"config": typed}))
    monkeypatch.chdir(tmp_path)
    assert of_photos(tmp_path / "root", "pics").current("encode") is not None


@pytest.mark.parametrize("typed", ["{}/pics/", "file://{}/pics", "{}/./pics"])
def test_the_same_folder_in_other_words_is_no_other_config_whatever_was_added(typed: str, tmp_path: Path) -> None:
    class_folders(tmp_path / "pics", per_class=4)
    finish_photos(tmp_path / "root", str(tmp_path / "pics"))
    book = of_photos(tmp_path / "root", str(tmp_path / "pics"))
    for stage in ("meta_train", "encode"):
        record = read_record(book.location, stage)
        assert record is not None
        older = record.config | {"images.location": typed.format(tmp_path)}
        write_record(book.location, record.model_copy(update={"config": older}))
    class_folders(tmp_path / "pics/new", per_class=4, classes=("emu",))
    assert of_photos(tmp_path / "root", str(tmp_path / "pics")).up_to_date("encode") is not None


def test_a_root_of_an_older_version_names_the_setting_that_continues_it(tmp_path: Path) -> None:
    class_folders(tmp_path / "pics", per_class=4)
    finish_photos(tmp_path / "root", str(tmp_path / "pics"))
    book = of_photos(tmp_path / "root", str(tmp_path / "pics"))
    for stage in ("meta_train", "encode"):
        record = read_record(book.location, stage)
        assert record is not None
        older = {key: value for key, value in record.config.items() if key != "images.split"}
        images = {key: value for key, value in record.pipeline["images"].items() if key != "split"}
        changed = {"config": older, "pipeline": record.pipeline | {"images": images}}
        write_record(book.location, record.model_copy(update=changed))
    with pytest.raises(StageConflict, match=r"None -> 'by_key'\): --set images.split=stratified continues it"):
        of_photos(tmp_path / "root", str(tmp_path / "pics")).up_to_date("encode")
    same = read_record(book.location, "encode")
    assert same is not None
    assert Ledger(recorded_config(same), book.root).up_to_date("encode") is not None
