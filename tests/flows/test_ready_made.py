"""Presets with `field.pretrained`, and `encode.steps`: what they change, and what they leave as it was."""

from pathlib import Path

import numpy as np
import pytest

import functa
from functa.flows.config.digests import chain_digests, stage_config
from functa.flows.config.load import load_config
from functa.flows.config.schema import ConfigError, PipelineConfig
from functa.flows.jobs import encode_job, meta_train_job
from functa.flows.ledger import Ledger
from functa.storage.errors import StorageError
from functa.storage.functaset.functaset import Functaset
from functa.storage.images.source import open_images
from functa.tasks.encoding.encode import encode_group
from functa.tasks.encoding.finalise import finalise
from functa.tasks.encoding.plan import plan
from functa.tasks.inference.ready import shipped
from functa.tasks.inference.ready.adopt import adopt
from functa.tasks.inference.ready.field import ReadyField
from tests.helpers.flows.tiny_config import TINY
from tests.helpers.flows.trained_root import trained_root
from tests.helpers.tasks.encoded import encoded
from tests.helpers.tasks.ready_fields import write_ready

GREY = ["field.pretrained=grey", "images.limit=60"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of shipped fields: one of digits' patches of 2x2 pixels, and one of colour."""
    monkeypatch.setattr(shipped, "FOLDER", str(tmp_path / "ready"))
    write_ready(tmp_path / "ready", "grey", patch=2, image_channels=1)
    write_ready(tmp_path / "ready", "colour", patch=2)
    return tmp_path / "ready"


def test_a_pretrained_field_brings_its_own_settings() -> None:
    config = load_config("digits", GREY)
    record = shipped.find("grey")
    assert config.field == record.field.model_copy(update={"spatial": 4, "pretrained": "grey"})
    assert config.inner == record.inner
    assert PipelineConfig.model_validate(config.model_dump(mode="json")) == config


def test_the_weights_of_a_pretrained_field_decide_its_digests(folder: Path) -> None:
    before = chain_digests(load_config("digits", GREY))
    assert stage_config(load_config("digits", GREY), "encode")["field.pretrained"].startswith("grey@")
    write_ready(folder, "grey", patch=2, image_channels=1, w0=11)
    after = chain_digests(load_config("digits", GREY))
    assert not set(before.values()) & set(after.values())


def test_settings_that_are_not_set_are_in_no_digest() -> None:
    config = load_config("digits")
    assert not {"field.pretrained", "encode.steps"} & {
        key for stage in ("meta_train", "encode") for key in stage_config(config, stage)
    }
    assert stage_config(load_config("digits", ["encode.steps=5"]), "encode")["encode.steps"] == 5


def test_a_pretrained_field_is_adopted_in_place_of_a_training(tmp_path: Path) -> None:
    ledger = Ledger(load_config("digits", [*GREY, "encode.quantization.bits=32"]), str(tmp_path / "root"))
    with ledger.working("meta_train") as record:
        ledger.finish(record, adopt(meta_train_job(ledger, record)), {})
    assert ledger.up_to_date("meta_train") is not None
    with ledger.working("encode") as record:
        job = encode_job(ledger, record)
        todo = plan(job)
        for group in todo.groups:
            encode_group(job, group, 60)
        done = finalise(job, todo)
        ledger.finish(record, done["info"]["content"], done)
    stored = Functaset.open(tmp_path / "root").load("test")
    pixels = open_images(ledger.config.images).split("test").read(stored.source_rows).images
    ready = functa.load_field("grey")
    assert isinstance(ready, ReadyField)
    np.testing.assert_allclose(stored.dequantized(), ready.encode(pixels), atol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["field.pretrained=gray"], "unknown field 'gray': did you mean 'grey'"),
        ([*GREY, "field.width=64"], "--set field.width and field.pretrained=grey exclude each other"),
        ([*GREY, "meta_train.steps=9"], "--set meta_train.steps and field.pretrained=grey exclude each other"),
        (["field.pretrained=colour"], "knows images of 3 channels, not 1: set images.channels=3"),
        ([*GREY, "images.resolution=7"], "codes patches of 2x2 pixels: set images.resolution to a multiple of 2"),
        (["images.source=folder", "images.location=x", "field.pretrained=colour"], "such as 256"),
    ],
    ids=str,
)
def test_a_pretrained_field_that_does_not_fit_is_refused(overrides: list[str], fault: str) -> None:
    with pytest.raises((ConfigError, shipped.UnknownField), match=fault) as raised:
        load_config("digits", overrides)
    assert raised.value.exit_status == 2


def test_a_config_that_was_not_loaded_is_refused(tmp_path: Path) -> None:
    config = load_config("digits")
    other = config.model_copy(update={"field": config.field.model_copy(update={"pretrained": "grey"})})
    ledger = Ledger(other, str(tmp_path / "root"))
    with ledger.working("meta_train") as record, pytest.raises(StorageError, match="make the config with load_config"):
        adopt(meta_train_job(ledger, record))


def test_encoding_takes_as_many_inner_steps_as_it_is_asked_to(tmp_path: Path) -> None:
    plain, more = encoded(tmp_path / "plain"), encoded(tmp_path / "more", "encode.steps=9")
    means = [Functaset.open(job.functaset).info()["psnr"]["mean"] for _, job in (plain, more)]
    assert means[1] != pytest.approx(means[0], abs=1e-3)
    functaset = Functaset.open(more[1].functaset)
    assert functaset.fingerprint["inner.steps"] == 9
    keys = functaset.fingerprint.keys() | Functaset.open(plain[1].functaset).fingerprint.keys()
    theirs = Functaset.open(plain[1].functaset).fingerprint
    assert [key for key in keys if functaset.fingerprint.get(key) != theirs.get(key)] == ["inner.steps"]
    stored = functaset.load("test")
    pixels = open_images(more[0].images).split("test").read(stored.source_rows).images
    np.testing.assert_allclose(functa.encode(more[1].functaset, pixels), stored.dequantized(), atol=1e-6)


def test_what_a_root_trained_on_more_steps_is_measured_with_them(tmp_path: Path) -> None:
    ledger = trained_root(tmp_path / "root", "encode.steps=6", stages=("meta_train", "encode"))
    from functa.flows.jobs import evaluation_job
    from functa.tasks.evaluation.reconstruction import measure

    measured = measure(evaluation_job(ledger, str(tmp_path / "run")))
    assert list(measured["psnr_by_step"]["test"]) == [str(step) for step in range(7)]
    more = measured["psnr_by_more_steps"]
    assert list(more)[:7] == [str(step) for step in range(7)] and len(more) <= 21
    assert TINY
