"""Exports to a hub and back, with the hub's own client and a hub on loopback."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from functa.storage.errors import DamagedObject, MissingObject, StorageError, TransientError
from functa.storage.publish import hub as hub_module
from functa.storage.publish.fetch import fetch
from functa.storage.publish.hub import HubTarget, check_writable, hub_address
from tests.helpers.storage.functasets import tree
from tests.helpers.storage.stub_hub import READER, StubHub, stub_hub
from tests.storage.publish.test_fetch import exported


@pytest.fixture
def hub() -> Iterator[StubHub]:
    with stub_hub() as running:
        yield running


def upload(source: Path, address: str, **options: Any) -> None:
    """Put the files of an exported folder into a repository."""
    found = hub_address(address)
    assert found is not None
    cards = {"README.md": b"---\nlicense: mit\n---\n" + (source / "README.md").read_bytes()}
    files = [path for path in tree(source) if path not in ("README.md", "functa.json")]
    target = HubTarget(found.of_kind(found.kind or "model"), [*files, *cards], **options)
    for path in files:
        target.put(path, (source / path).read_bytes())
    target.finish((source / "functa.json").read_bytes(), cards)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return exported(tmp_path / "source")


def test_what_is_fetched_is_what_was_uploaded(hub: StubHub, source: Path, tmp_path: Path) -> None:
    upload(source, "hf://lab/digits")
    repository = hub.model("lab/digits")
    assert len(repository.revisions) == 2  # the hub's own, and one with everything
    assert any(request.startswith("PUT /large/") for request in hub.requests)
    assert fetch("hf://lab/digits", str(tmp_path / "copy")).licence == "MIT"
    ours, theirs = tree(source), tree(tmp_path / "copy")
    assert {path: theirs[path] for path in ours if path != "README.md"} == {
        path: digest for path, digest in ours.items() if path != "README.md"
    }
    assert (tmp_path / "copy/README.md").read_text().endswith("words")
    assert not repository.private


def test_data_lies_in_a_repository_of_data_and_is_found_by_its_name(hub: StubHub, source: Path, tmp_path: Path) -> None:
    upload(source, "hf://datasets/lab/digits", private=True)
    assert hub.dataset("lab/digits").private
    for number, address in enumerate(("hf://datasets/lab/digits", "hf://lab/digits")):
        assert fetch(address, str(tmp_path / str(number))).kind == "functaset"
    with pytest.raises(MissingObject, match="the hub has no model of that name, or it is private"):
        fetch("hf://models/lab/digits", str(tmp_path / "copy"))


def test_a_revision_stays_what_it_was(hub: StubHub, source: Path, tmp_path: Path) -> None:
    upload(source, "hf://lab/digits")
    repository = hub.model("lab/digits")
    first = repository.commit(repository.files | {"LICENSE": b"that somebody added"})
    other = exported(tmp_path / "other", more={"new.txt": b"new"}, fewer=("empty",))
    upload(other, "hf://lab/digits", replaces=True)
    fetch("hf://lab/digits", str(tmp_path / "now"))
    fetch(f"hf://lab/digits@{first}", str(tmp_path / "then"))
    assert {"new.txt"} == {*tree(tmp_path / "now")} - {*tree(tmp_path / "then")}
    assert {"empty"} == {*tree(tmp_path / "then")} - {*tree(tmp_path / "now")}
    assert {"LICENSE", "new.txt"} <= repository.files.keys()
    assert "empty" not in repository.files
    with pytest.raises(MissingObject, match="has no revision 0000"):
        fetch("hf://lab/digits@0000", str(tmp_path / "copy"))


@pytest.mark.parametrize("there", [{"model.bin": b"theirs"}, {"zarr.json": b"theirs"}])
def test_a_name_is_taken_by_anything_else(hub: StubHub, source: Path, there: dict[str, bytes]) -> None:
    upload(source, "hf://lab/digits")
    hub.model("lab/digits").commit(there)
    for replaces in (False, True) if "model.bin" in there else (False,):
        with pytest.raises(StorageError, match=r"hf://lab/digits: is taken: .* there .*; choose another name"):
            upload(source, "hf://lab/digits", replaces=replaces)
    assert hub.model("lab/digits").files == there


def test_another_export_is_replaced_only_if_asked(hub: StubHub, source: Path, tmp_path: Path) -> None:
    upload(source, "hf://lab/digits")
    upload(source, "hf://lab/digits")  # the same: nothing to do
    assert len(hub.model("lab/digits").revisions) == 2
    other = exported(tmp_path / "other", more={"zarr.json": b"[]"})
    with pytest.raises(
        StorageError,
        match=r"zarr\.json there has another content; .*, or put a new revision over that export with --replace",
    ):
        upload(other, "hf://lab/digits")


@pytest.mark.faults
def test_a_broken_upload_is_no_export_and_is_continued(
    hub: StubHub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "BATCH_FILES", 1)
    commits = iter((0, 500))
    hub.fails = lambda request: next(commits, 500) if "/commit/" in request else 0
    with pytest.raises(TransientError, match=r"hf://lab/digits: the hub answers 500"):
        upload(source, "hf://lab/digits")
    assert len(hub.model("lab/digits").files) == 2  # the first batch, and the hub's own file
    with pytest.raises(MissingObject, match=r"functa\.json: is no export of functa"):
        fetch("hf://lab/digits", str(tmp_path / "copy"))
    hub.fails = lambda request: 0
    upload(source, "hf://lab/digits")
    fetch("hf://lab/digits", str(tmp_path / "copy"))


@pytest.mark.faults
def test_a_file_that_is_not_the_manifests_is_refused(hub: StubHub, source: Path, tmp_path: Path) -> None:
    upload(source, "hf://lab/digits")
    repository = hub.model("lab/digits")
    repository.commit(repository.files | {"zarr.json": b"forged"})
    with pytest.raises(DamagedObject, match=r"zarr\.json: is not what functa\.json there describes"):
        fetch("hf://lab/digits", str(tmp_path / "copy"))
    assert not (tmp_path / "copy/zarr.json").exists()
    assert not (tmp_path / "copy/functa.json").exists()


def test_without_a_token_nothing_is_written(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("hf://lab/digits", "hf://datasets/lab/digits"):
        found = hub_address(address)
        assert found is not None
        check_writable(found)
        with monkeypatch.context() as patch:
            patch.delenv("HF_TOKEN")
            with pytest.raises(StorageError, match=r"needs a token of the hub: run `hf auth login`, or set HF_TOKEN"):
                check_writable(found)
    assert hub.requests == []


def test_nothing_is_uploaded_into_an_old_revision() -> None:
    found = hub_address("hf://lab/digits@0123abc")
    assert found is not None
    with pytest.raises(StorageError, match="an export makes a new revision; leave @0123abc out"):
        check_writable(found)


@pytest.mark.parametrize(
    ("token", "line"),
    [("hf_wrong", "the hub does not accept the token"), (READER, "the token has no right to do that")],
)
def test_a_token_without_the_right_is_named(
    hub: StubHub, source: Path, monkeypatch: pytest.MonkeyPatch, token: str, line: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(StorageError, match=line):
        upload(source, "hf://lab/digits")
    assert hub.repositories == {}


@pytest.mark.faults
def test_a_hub_that_cannot_be_reached_is_one_line(
    hub: StubHub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(source, "hf://lab/digits")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", nobody)
    for act in (lambda: upload(source, "hf://lab/digits"), lambda: fetch("hf://lab/digits", str(tmp_path / "copy"))):
        with pytest.raises(TransientError, match=r"hf://lab/digits: cannot reach the hub .*HF_ENDPOINT") as failed:
            act()
        assert "\n" not in str(failed.value)


def test_metadata_that_the_hub_refuses_is_one_line(hub: StubHub, source: Path) -> None:
    found = hub_address("hf://lab/digits")
    assert found is not None
    target = HubTarget(found.of_kind("model"), ["README.md"])
    with pytest.raises(StorageError, match=r'hf://lab/digits: .*"license" is required'):
        target.finish(b"{}", {"README.md": b"no metadata"})


@pytest.mark.attacks
@pytest.mark.parametrize(
    "text",
    ["hf://", "hf://name", "hf://a/b/c", "hf://../b", "hf://spaces/a/b", "hf://a/b?x", "hf://a b/c", "hf://a/b@"],
)
def test_what_names_no_repository_is_refused(text: str) -> None:
    with pytest.raises(StorageError, match="expected hf://USER/NAME"):
        hub_address(text)
