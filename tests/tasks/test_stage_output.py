"""A stage's output is found, and what is missing is reported with its reason."""

from pathlib import Path
from typing import Any

import pytest

from functa.storage.errors import StorageError
from functa.storage.places.address import open_location
from functa.storage.runs.stage_records import StageRecord, write_record
from functa.tasks.stage_output import stage_output


def record(root: Path, stage: str, started: str = "2026-01-01", **values: Any) -> None:
    """Write a finished stage's record."""
    fields: dict[str, Any] = {"state": "finished", "config": {}, "inputs": {}, "output": stage, "started": started}
    write_record(open_location(str(root)), StageRecord(stage=stage, **fields | values))


def test_a_finished_stage_and_a_functaset_that_receives_images_have_an_output(tmp_path: Path) -> None:
    record(tmp_path, "meta_train")
    record(tmp_path, "encode", state="running", output_digest="feed")
    root = open_location(str(tmp_path))
    assert stage_output(root, "meta_train").uri.endswith("meta_train")
    assert stage_output(root, "encode").uri.endswith("encode")


def test_a_folder_without_a_run_is_reported_as_such(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no run has been started there; name the root of a run"):
        stage_output(open_location(str(tmp_path / "missing")), "train_diffusion")


def test_a_model_that_the_newest_config_switched_off_is_reported_as_such(tmp_path: Path) -> None:
    record(tmp_path, "meta_train", pipeline={"classifier": {"steps": 1}})
    record(tmp_path, "encode", started="2026-01-02", pipeline={"classifier": None})
    with pytest.raises(StorageError, match="its config has classifier=null, so it has no classifier") as caught:
        stage_output(open_location(str(tmp_path)), "train_classifier")
    fix = f"`functa train-classifier PRESET --root {tmp_path} --set classifier={{}}` trains one"
    assert fix in str(caught.value)


def test_a_stage_that_has_not_finished_is_reported_as_such(tmp_path: Path) -> None:
    record(tmp_path, "meta_train", pipeline={"diffusion": {"steps": 1}})
    record(tmp_path, "train_diffusion", state="failed")
    with pytest.raises(StorageError, match="train-diffusion has not finished there; run `functa train-diffusion"):
        stage_output(open_location(str(tmp_path)), "train_diffusion")
