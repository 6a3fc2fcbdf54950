"""Records of functasets and roots, changed at random and sealed again: something valid, or their one error class."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from functa.flows.cli.status import read_status
from functa.storage.errors import DamagedObject, StorageError
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.header import read_root
from functa.storage.functaset.history import latest
from functa.storage.functaset.plan import RowTable
from functa.storage.functaset.records import canonical
from functa.storage.places.address import open_location
from functa.storage.runs.stage_records import read_record
from functa.storage.upkeep.gc import collect
from functa.storage.upkeep.status import status
from functa.storage.upkeep.verify import verify
from tests.helpers.fuzzing import as_json, changed, examples, mutated
from tests.helpers.old_root import extract_old_root
from tests.helpers.storage.functasets import filled

pytestmark = [pytest.mark.attacks, pytest.mark.fuzz]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "s"
    filled(folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return extract_old_root(tmp_path_factory.mktemp("old")) / "root"


def sealed(document: Any) -> Any:
    """Return a record with the right checksum: what somebody would write who knows the format."""
    import hashlib

    if not isinstance(document, dict):
        return document
    content = {key: value for key, value in document.items() if key != "checksum"}
    return content | {"checksum": hashlib.sha256(canonical(content)).hexdigest()}


def replaced(path: Path, data: bytes, use: Callable[[], object], error: type[Exception]) -> None:
    """Use the changed file, which may work or raise `error`; then put the old one back."""
    before = path.read_bytes()
    try:
        path.write_bytes(data)
        with suppress(error):
            use()
    finally:
        path.write_bytes(before)


def document(path: Path) -> list[Any]:
    return [json.loads(path.read_text())]


def drawn(path: Path, rewrite: Callable[[Any], Any] = sealed) -> st.SearchStrategy[bytes]:
    """Draw the file's bytes, changed as a document or as bytes."""
    return st.one_of(changed(document(path)).map(lambda value: as_json(value, rewrite)), mutated([path.read_bytes()]))


def read_everything(folder: Path) -> None:
    functaset = Functaset.open(str(folder))
    functaset.info()
    functaset.moments()
    for split in functaset.splits:
        latents = functaset.load(split)
        assert latents.keys


@pytest.mark.parametrize("part", ["commit", "plan", "receipt", "rows", "zarr.json", "z/zarr.json", "field"])
def test_changed_records_of_a_functaset_are_read_or_named(store: Path, part: str) -> None:
    fragment = min(path.parent for path in store.glob("fragments/*/plan.json"))
    path = {
        "commit": max(store.glob("commits/*.json")), "plan": fragment / "plan.json",
        "receipt": fragment / "receipts/000000.0.json", "rows": fragment / "rows/000000.json",
        "zarr.json": store / "zarr.json", "z/zarr.json": fragment / "z/zarr.json",
        "field": next(store.glob("fields/*.json")),
    }[part]  # fmt: skip
    for mark in store.glob("commits/*.sha256"):
        mark.unlink()  # a stranger would write the right one

    @examples(5)
    @given(drawn(path))
    def check(data: bytes) -> None:
        location = open_location(str(store))
        replaced(path, data, lambda: read_everything(store), StorageError)
        replaced(path, data, lambda: latest(location), StorageError)
        replaced(path, data, lambda: status(location), StorageError)
        replaced(path, data, lambda: verify(location, deep=True), StorageError)
        replaced(path, data, lambda: collect(location), StorageError)
        replaced(path, data, lambda: read_root(location), StorageError)

    check()


def test_a_table_of_rows_is_whole_or_no_table() -> None:
    table = {"keys": ["a", "b"], "labels": [0, 1], "tokens": ["", ""], "rows": [0, 1], "augmentations": [0, 1]}

    @examples(60)
    @given(st.one_of(changed([table]).map(as_json), mutated([as_json(table)])))
    def check(data: bytes) -> None:
        with suppress(ValueError):
            found = RowTable.from_bytes(data)
            assert all(isinstance(key, str) for key in found.keys)
            assert len(found.labels) == len(found.rows) == len(found.names)

    check()


@pytest.mark.parametrize("stage", ["meta_train", "encode", "train_classifier", "evaluate"])
def test_changed_stage_records_are_read_or_named(root: Path, stage: str) -> None:
    path = root / "stages" / f"{stage}.json"

    @examples(5)
    @given(drawn(path, lambda value: value))
    def check(data: bytes) -> None:
        replaced(path, data, lambda: read_record(open_location(str(root)), stage), StorageError)
        replaced(path, data, lambda: read_status(str(root)), StorageError)
        replaced(path, data, lambda: Functaset.open(str(root)), StorageError)

    check()


def test_json_of_any_kind_is_read_or_damaged(tmp_path: Path) -> None:
    from functa.storage.places.address import parse_json

    @examples(40)
    @given(st.one_of(mutated([b'{"a": [1, 2.5, "x", null, true]}']), st.just(b"[" * 100_000), st.just(b"9" * 10_000)))
    def check(data: bytes) -> None:
        with suppress(DamagedObject):
            parse_json(data, "x")

    check()
