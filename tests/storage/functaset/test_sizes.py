"""JSON that readers would refuse for its length is refused before any work, and is never written."""

from collections.abc import Callable
from pathlib import Path

import pytest

from functa.storage.errors import DamagedObject, StorageError
from functa.storage.functaset.commit import commit
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.header import FieldRecord
from functa.storage.functaset.history import commit_key
from functa.storage.functaset.records import ObjectRecord, create_record
from functa.storage.places import address
from functa.storage.places.address import MAX_JSON_BYTES, MAX_STAGE_BYTES, open_location, read_json, write_json
from functa.storage.places.location import Location
from functa.storage.runs.checkpoints import save_checkpoint
from functa.storage.runs.stage_records import StageRecord, read_record, write_record
from tests.helpers.storage.functasets import FIELD, filled, plan, write

LONG = "x" * (MAX_JSON_BYTES + 1)


def field_of(description: str) -> FieldRecord:
    return FieldRecord(config={"a": description}, digest="d", tensors=ObjectRecord(bytes=0, sha256="0" * 64))


WRITERS: dict[str, Callable[[Location, str], object]] = {
    "a record": lambda place, text: create_record(place, "r.json", field_of(text), "describe it in less"),
    "plain JSON": lambda place, text: write_json(place, "r.json", text),
    "a checkpoint's marker": lambda place, text: save_checkpoint(place, 1, FIELD, {"a": text}),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_what_would_be_too_long_to_be_read_back_is_not_written(kind: str, tmp_path: Path) -> None:
    place = open_location(str(tmp_path))
    with pytest.raises(
        StorageError, match=rf"would have \d+ bytes of JSON, and readers take {MAX_JSON_BYTES}"
    ) as error:
        WRITERS[kind](place, LONG)
    assert "\n" not in str(error.value)
    assert not [key for key in place.list() if key.endswith(".json")]
    WRITERS[kind](place, "short")


@pytest.mark.parametrize("more", [0, 1])
def test_what_is_just_short_enough_is_written_and_read_back(more: int, tmp_path: Path) -> None:
    place = open_location(str(tmp_path))
    text = "x" * (MAX_JSON_BYTES - 3 + more)  # two quotation marks and the end of the line
    if more:
        with pytest.raises(StorageError, match="readers take"):
            write_json(place, "a.json", text)
        place.write("a.json", f'"{text}"\n'.encode())
        with pytest.raises(DamagedObject, match="has more than"):
            read_json(place, "a.json")
        return
    write_json(place, "a.json", text)
    assert read_json(place, "a.json") == text


def test_a_stages_record_that_lists_many_bad_images_is_written_and_its_functaset_opened(tmp_path: Path) -> None:
    filled(tmp_path / "functaset.zarr")
    root = open_location(str(tmp_path))
    figures = {"bad_inputs": [{"key": "k", "reason": "x" * 1000}] * (MAX_JSON_BYTES // 1000)}
    record = StageRecord(
        stage="encode", state="finished", config={}, inputs={}, output="functaset.zarr", started="", figures=figures
    )
    write_record(root, record)
    assert MAX_JSON_BYTES < (root.size("stages/encode.json") or 0) < MAX_STAGE_BYTES
    assert read_record(root, "encode") == record
    assert Functaset.open(root).rows("train") == 20


def test_a_commit_that_readers_would_refuse_is_not_made_and_the_one_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = filled(tmp_path / "s")
    more = plan(place, n=5, first=20)
    write(place, more, 0)
    size = place.size(commit_key(1)) or 0
    monkeypatch.setattr(address.readable, "__defaults__", (size + 100,))
    with pytest.raises(StorageError, match=r"commits/00000002\.json: would have .* larger encode\.shard_rows"):
        commit(place, [more.id])
    monkeypatch.undo()
    assert Functaset.open(place).version == 1
    assert len(commit(place, [more.id]).fragments) == 3
