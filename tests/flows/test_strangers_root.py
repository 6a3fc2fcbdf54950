"""A root that somebody else made decides neither what a worker connects to nor where it reads and writes."""

from pathlib import Path
from typing import Any

import pytest

from functa.flows.config.load import load_config
from functa.flows.config.schema import PipelineConfig
from functa.storage.errors import StorageError
from functa.storage.places.address import open_location
from functa.storage.places.allowed import ALLOWED_ROOTS
from functa.storage.runs.stage_records import StageRecord, write_record
from functa.tasks.config import DispatchConfig
from tests.helpers.flows.tiny_config import TINY

pytestmark = [pytest.mark.attacks, pytest.mark.server]


def encoded(root: Path, *overrides: str) -> str:
    """Write the record of an encoding with this config; return the root."""
    record = StageRecord(
        stage="encode", state="finished", config={}, inputs={}, output="functaset.zarr", started="now",
        pipeline=load_config("digits", list(overrides)).model_dump(mode="json"),
    )  # fmt: skip
    write_record(open_location(str(root)), record)
    return str(root)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch, prefect_server: None) -> list[PipelineConfig]:
    """The configs that re-encode encodes with."""
    configs: list[PipelineConfig] = []

    def encode(root: str, *, config: PipelineConfig, **_: Any) -> None:
        configs.append(config)

    monkeypatch.setattr("functa.flows.re_encode.encode", encode)
    return configs


def test_a_roots_record_chooses_no_address_and_no_device(tmp_path: Path, used: list[PipelineConfig]) -> None:
    from functa.flows.re_encode import re_encode

    hostile = ["address=tls://evil.example:8786", "device=cuda", "devices=4", "workers=3"]
    root = encoded(tmp_path, "dispatch.runner=dask", *(f"dispatch.{each}" for each in hostile))
    re_encode(root)
    assert used[-1].dispatch == DispatchConfig(runner="dask", workers=3)
    operators = DispatchConfig(runner="dask", address="tls://ours.example:8786")
    re_encode(root, dispatch=operators)
    assert used[-1].dispatch == operators


def test_an_event_with_a_root_or_images_elsewhere_starts_nothing(
    tmp_path: Path, used: list[PipelineConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    from functa.flows.re_encode import re_encode

    pictures = ["images.source=folder", f"images.location={tmp_path}/pictures"]
    root, elsewhere = (encoded(tmp_path / name, *pictures) for name in ("runs", "elsewhere"))
    monkeypatch.setenv(ALLOWED_ROOTS, f"{root},{tmp_path}/images")
    for given in ({"root": elsewhere}, {"root": "s3://evil/root"}, {"root": root, "images": f"{tmp_path}/pictures/a"}):
        with pytest.raises(StorageError, match="is in none of the locations"):
            re_encode(**{"images": "", **given})
    assert not used


@pytest.mark.slow
def test_a_whole_run_needs_no_location_but_its_root(
    tmp_path: Path, prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from functa.flows.pipeline import pipeline

    monkeypatch.setenv(ALLOWED_ROOTS, str(tmp_path / "root"))
    assert pipeline(str(tmp_path / "root"), config=load_config("digits", TINY))["psnr_test"] > 10


def test_a_preset_of_a_run_is_a_name_and_never_a_path(tmp_path: Path, prefect_server: None) -> None:
    from prefect.exceptions import ParameterTypeError

    from functa.flows.pipeline import pipeline

    (tmp_path / "preset.yaml").write_text("extends: digits\n")
    with pytest.raises(ParameterTypeError):
        pipeline(str(tmp_path / "root"), preset=f"{tmp_path}/preset.yaml", config=load_config("digits"))
    assert not (tmp_path / "root").exists()
