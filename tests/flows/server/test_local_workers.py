"""The workers of `functa up` may use what an operator needs of this machine, and no more."""

from pathlib import Path

import pytest

from functa.flows.config.load import load_config
from functa.flows.server.local_workers import allowed_places
from functa.storage.places.address import open_location
from functa.storage.places.allowed import ALLOWED_ROOTS
from functa.storage.places.reused import allow_reuse
from functa.storage.runs.stage_records import StageRecord, write_record


@pytest.mark.attacks
def test_runs_may_use_what_an_operator_needs_and_never_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ALLOWED_ROOTS, raising=False)
    here, images = str(tmp_path / "here"), tmp_path / "images"
    for folder in (Path(here), images):
        folder.mkdir()
    (images / "one.npz").touch()
    monkeypatch.chdir(here)
    assert allowed_places("/data/runs/digits") == ["/data/runs/digits", "/data/runs", here]
    assert allowed_places("s3://bucket/runs/digits") == ["s3://bucket/runs/digits", "s3://bucket/runs", here]
    assert allowed_places("s3://bucket/digits") == ["s3://bucket/digits", "s3://bucket", here]
    assert allowed_places("s3://bucket") == ["s3://bucket", here]
    assert allowed_places("/digits") == ["/digits", here], "its parent would be everything"
    for source, location in (("folder", ""), ("npz", "/one.npz"), ("webdataset", "/{train,val}-*.tar")):
        chosen = [f"images.source={source}", f"images.location={images}{location}"]
        config = load_config("digits", chosen).model_dump(mode="json")
        record = StageRecord(
            stage="encode", state="finished", config={}, pipeline=config, inputs={}, output="x", started="now"
        )
        write_record(open_location(f"{here}/runs/{source}"), record)
        strangers = allowed_places(f"{here}/runs/{source}")
        assert strangers == [f"{here}/runs/{source}", f"{here}/runs", here], "nothing that only its record names"
        allow_reuse(open_location(f"{here}/runs/{source}"), f"{images}{location}")  # as an encoding by this user does
        assert allowed_places(f"{here}/runs/{source}") == [*strangers, str(images)]
    monkeypatch.chdir("/")
    assert allowed_places("/data/runs/digits") == ["/data/runs/digits", "/data/runs"]
    monkeypatch.setenv(ALLOWED_ROOTS, "~/a, s3://bucket")
    assert allowed_places("/data/runs/digits") == [str(Path("~/a").expanduser()), "s3://bucket"]
