"""Copies of exports: every file is the manifest's, nothing of others is replaced, a hostile manifest writes nowhere."""

import json
from pathlib import Path
from typing import Any

import pytest

from functa.storage.errors import DamagedObject, MissingObject, StorageError
from functa.storage.functaset.records import vouch
from functa.storage.publish.fetch import fetch
from functa.storage.publish.manifest import Manifest
from tests.helpers.storage.functasets import damage, tree
from tests.helpers.storage.locations import Home


def exported(folder: Path, more: dict[str, bytes] | None = None, fewer: tuple[str, ...] = (), **changes: Any) -> Path:
    """Write a small export; `changes` are made to its manifest."""
    folder.mkdir(parents=True)
    files = {"zarr.json": b"{}", "fragments/a/z/c/0": bytes(range(256)) * 40, "empty": b""} | (more or {})
    files = {path: data for path, data in files.items() if path not in fewer}
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    (folder / "README.md").write_text("words")
    records = {path: vouch(data) for path, data in files.items()}
    manifest = Manifest(kind="functaset", licence="MIT", files=records, cards=("README.md",))
    (folder / "functa.json").write_text(json.dumps(json.loads(manifest.stored("")) | changes, indent=1) + "\n")
    return folder


def test_a_copy_has_every_file_and_is_an_export(home: Home, tmp_path: Path) -> None:
    source = exported(tmp_path / "source")
    (source / "other.txt").write_text("is not in the manifest")
    calls: list[tuple[int, int]] = []
    manifest = fetch(str(source), f"{home}/copy", lambda *done: calls.append(done))
    assert (manifest.kind, manifest.licence) == ("functaset", "MIT")
    (source / "other.txt").unlink()
    assert tree(home / "copy") == tree(source)
    assert calls == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("how", "fault"), [("flipped", "was altered"), ("short", "has 5120 bytes and"), ("missing", "is missing")]
)
def test_a_damaged_file_is_named_and_the_copy_is_no_export(tmp_path: Path, how: str, fault: str) -> None:
    source = exported(tmp_path / "source")
    damage(source / "fragments/a/z/c/0", how)
    with pytest.raises((DamagedObject, MissingObject), match=f"fragments/a/z/c/0: {fault}.*; ask its author"):
        fetch(str(source), str(tmp_path / "copy"))
    assert not (tmp_path / "copy/functa.json").exists()
    assert not (tmp_path / "copy/fragments/a/z/c/0").exists()


@pytest.mark.faults
def test_an_interrupted_copy_continues(tmp_path: Path) -> None:
    source, copy = exported(tmp_path / "source"), tmp_path / "copy"
    fetch(str(source), str(copy))
    (copy / "functa.json").unlink()
    (copy / "zarr.json").unlink()
    kept = copy / "fragments/a/z/c/0"
    before = kept.stat().st_mtime_ns
    fetch(str(source), str(copy))
    assert tree(copy) == tree(source)
    assert kept.stat().st_mtime_ns == before


@pytest.mark.parametrize("name", ["mine.txt", "zarr.json", "README.md.txt"])
def test_what_lies_in_the_destination_is_not_replaced(tmp_path: Path, name: str) -> None:
    source, copy = exported(tmp_path / "source"), tmp_path / "copy"
    copy.mkdir()
    (copy / name).write_text("mine")
    with pytest.raises(StorageError, match=f"is taken: {name} there"):
        fetch(str(source), str(copy))
    assert (copy / name).read_text() == "mine"


@pytest.mark.attacks
@pytest.mark.parametrize("path", ["../outside", "/tmp/outside", "a/../../b", "", "a//b", "nul\0"])
def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path: Path, path: str) -> None:
    for changes in ({"files": {path: {"bytes": 1, "sha256": "0" * 64}}}, {"cards": [f"{path}/README.md"]}):
        source = exported(tmp_path / str(len(changes.get("cards", ()))), **changes)
        with pytest.raises(DamagedObject, match="does not describe an export of this version"):
            fetch(str(source), str(tmp_path / "copy"))
    assert not (tmp_path / "copy").exists()


@pytest.mark.attacks
@pytest.mark.parametrize(
    "changes",
    [{"format": 2}, {"kind": "program"}, {"cards": ["zarr.json"]}, {"other": 1}, {"licence": ""}, {"files": 3}],
)
def test_a_manifest_of_another_shape_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(DamagedObject, match="does not describe an export of this version"):
        fetch(str(exported(tmp_path / "source", **changes)), str(tmp_path / "copy"))


def test_a_folder_without_a_manifest_is_no_export(tmp_path: Path) -> None:
    with pytest.raises(MissingObject, match="is no export"):
        fetch(str(tmp_path), str(tmp_path / "copy"))
    with pytest.raises(StorageError, match="lies in what is to be exported"):
        fetch(str(exported(tmp_path / "source")), str(tmp_path / "source/copy"))
