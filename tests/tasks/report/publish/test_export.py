"""Exports of a root, a functaset and a store of photographs: what they hold, and what opens from them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from sklearn.datasets import load_digits

import functa
from functa.flows.ledger import Ledger
from functa.storage.errors import StorageError
from functa.storage.functaset.commit import retire
from functa.storage.functaset.functaset import Functaset
from functa.storage.places.address import open_location
from functa.storage.publish.fetch import fetch
from functa.storage.upkeep.gc import collect
from functa.storage.upkeep.verify import verify
from functa.tasks.report.publish.export import ExportRefused, Request, export
from tests.helpers.flows.command import error_line, here
from tests.helpers.old_root import extract_old_root
from tests.helpers.storage.functasets import damage, filled, new_store, plan, tree
from tests.helpers.storage.stub_hub import stub_hub

HOME = "/home/somebody/secret"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished root whose images lay in somebody's home."""
    root = extract_old_root(tmp_path_factory.mktemp("publish")) / "root"
    for record in (root / "stages").glob("*.json"):
        value = json.loads(record.read_text())
        value["pipeline"]["images"]["location"] = value["config"]["images.location"] = f"{HOME}/photos"
        value["pipeline"]["dispatch"] = {"address": f"tcp://{HOME}"}
        record.write_text(json.dumps(value))
    return root


@pytest.fixture(scope="module")
def exported(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "digits"
    export(Request(str(root), str(folder), "CC-BY-4.0"))
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Path:
    filled(tmp_path / "store")
    return tmp_path / "store"


def published(source: Path, to: Path) -> Path:
    export(Request(str(source), str(to), "MIT"))
    return to


def test_a_fetched_root_decodes_samples_and_classifies_to_the_bit(root: Path, exported: Path, tmp_path: Path) -> None:
    fetched = tmp_path / "fetched"
    assert fetch(str(exported), str(fetched)).kind == "root"
    images = (load_digits().images[:6, ..., None] / 16).astype(np.float32)
    z = functa.encode(str(root), images)
    assert np.array_equal(functa.encode(str(fetched), images), z)
    assert np.array_equal(functa.decode(str(fetched), z, 16), functa.decode(str(root), z, 16))
    assert np.array_equal(functa.sample(str(fetched), 3), functa.sample(str(root), 3))
    assert functa.classify(str(fetched), images) == functa.classify(str(root), images)
    ours, theirs = (functa.Functaset.open(each).load("test") for each in (root, fetched))
    assert np.array_equal(ours.dequantized(), theirs.dequantized())
    assert ours.keys == theirs.keys


def test_a_root_goes_to_the_hub_as_models_and_its_functaset_as_data(root: Path, tmp_path: Path) -> None:
    with stub_hub() as hub:
        models = export(Request(str(root), "hf://lab/digits", "CC-BY-4.0"))
        data = export(Request(str(root), "hf://datasets/lab/digits", "CC-BY-4.0"))
        fetch("hf://lab/digits", str(tmp_path / "root"))
        fetch("hf://datasets/lab/digits", str(tmp_path / "store"))
    assert (models.address, models.kind) == ("hf://lab/digits", "root")
    assert (data.address, data.kind) == ("hf://datasets/lab/digits", "functaset")
    assert ModelCard(hub.model("lab/digits").files["README.md"].decode()).data.license == "cc-by-4.0"
    assert "functa fetch hf://datasets/lab/digits" in hub.dataset("lab/digits").files["README.md"].decode()
    assert np.array_equal(functa.sample(str(tmp_path / "root"), 2), functa.sample(str(root), 2))
    ours, theirs = (functa.Functaset.open(each).load("test") for each in (root, tmp_path / "store"))
    assert np.array_equal(ours.dequantized(), theirs.dequantized())


def test_a_functaset_becomes_data_whatever_its_address(store: Path, tmp_path: Path) -> None:
    with stub_hub() as hub:
        done = here("export", str(store), "--to", "hf://lab/latents", "--licence", "MIT")
        assert done.stdout.startswith("hf://datasets/lab/latents: a functaset, ")
        assert list(hub.repositories) == ["datasets/lab/latents"]
        again = export(Request(published(store, tmp_path / "out").as_posix(), "hf://lab/second"))
    assert again.address == "hf://datasets/lab/second"


def test_without_a_token_the_command_ends_before_anything_is_read(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(store / "zarr.json", "flipped")
    with stub_hub() as hub:
        monkeypatch.delenv("HF_TOKEN")
        line = error_line(here("export", str(store), "--to", "hf://lab/latents", "--licence", "MIT"), 1)
        assert "hf://lab/latents: needs a token of the hub" in line
        assert hub.requests == []


@pytest.mark.parametrize("option", ["--private", "--replace"])
def test_options_of_the_hub_are_refused_for_a_folder(store: Path, tmp_path: Path, option: str) -> None:
    line = error_line(here("export", str(store), "--to", str(tmp_path / "out"), "--licence", "MIT", option), 2)
    assert f"{option}: is for repositories of the hub" in line


def test_stages_of_a_fetched_root_can_be_reused_by_another_root(tmp_path: Path) -> None:
    exported = published(extract_old_root(tmp_path) / "root", tmp_path / "out")
    config = functa.load_config(str(exported / "config.yaml"))
    ledger = Ledger(config, str(tmp_path / "root"), str(exported))
    stages = ("meta_train", "encode", "train_classifier", "train_diffusion")
    assert [stage for stage in stages if ledger.up_to_date(stage) is None] == []


def test_a_field_alone_is_published_and_encodes_the_same(root: Path, tmp_path: Path) -> None:
    trained = tmp_path / "trained"
    shutil.copytree(root / "checkpoints/field", trained / "checkpoints/field")
    (trained / "stages").mkdir()
    shutil.copy(root / "stages/meta_train.json", trained / "stages")
    fetched = published(trained, tmp_path / "out")
    assert not list(fetched.glob("**/step-*"))
    images = (load_digits().images[:4, ..., None] / 16).astype(np.float32)
    assert np.array_equal(functa.encode(str(fetched), images), functa.encode(str(trained), images))


def test_nothing_of_the_machine_is_published(exported: Path) -> None:
    for path in exported.rglob("*"):
        if path.is_file():
            assert HOME.encode() not in path.read_bytes(), path
    record = json.loads((exported / "stages/encode.json").read_text())
    assert (record["owner"], record["flow_run"]) == ("", "")
    assert record["config"]["images.location"] == record["pipeline"]["images"]["location"] == "photos"
    assert not list(exported.glob("**/step-*"))
    assert not (exported / "runs").exists()


def test_a_functaset_is_exported_as_its_versions_name_it(store: Path, tmp_path: Path) -> None:
    before = tree(store)
    (store / "notes.txt").write_text("mine")
    plan(open_location(str(store)), n=4, first=100)  # of an encoding at work
    out = published(store, tmp_path / "out")
    cards = ("README.md", "functa.json", "croissant.json")
    assert {path: digest for path, digest in tree(out).items() if path not in cards} == before
    assert verify(open_location(str(out)), deep=True).bad == []
    ours, theirs = (Functaset.open(each).load("train") for each in (store, out))
    assert np.array_equal(ours.dequantized(), theirs.dequantized())


def test_a_store_of_photographs_is_exported_with_every_size(tmp_path: Path) -> None:
    for size in ("16x8", "8x16"):
        filled(tmp_path / "store" / f"{size}.zarr")
    done = export(Request(str(tmp_path / "store"), str(tmp_path / "out"), "MIT"))
    assert done.kind == "photographs"
    for size in ("16x8", "8x16"):
        assert Functaset.open(tmp_path / "out" / f"{size}.zarr").rows("train") == 20
    card = (tmp_path / "out/README.md").read_text()
    assert "| 16x8.zarr | train | 20 |" in card


def test_bytes_of_retired_rows_are_not_published(store: Path, tmp_path: Path) -> None:
    location = open_location(str(store))
    retire(location, "train", ["train/00003"])
    with pytest.raises(StorageError, match=r"rows that are no longer shown.*gc .* --delete --erase-retired"):
        published(store, tmp_path / "out")
    collect(location, delete=True, erase_retired=True)
    assert Functaset.open(published(store, tmp_path / "out")).rows("train") == 19


@pytest.mark.faults
@pytest.mark.parametrize("how", ["flipped", "missing", "short"])
def test_a_store_that_does_not_verify_is_refused_before_anything_is_written(
    store: Path, tmp_path: Path, how: str
) -> None:
    damage(next(store.glob("fragments/*/z/c/0/0/0/0")), how)
    with pytest.raises(StorageError, match=r"does not verify, so nothing was exported \(fragments/.*/z/c/0"):
        published(store, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_were_altered_are_refused(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "root"
    shutil.copytree(root, copy)
    damage(copy / "checkpoints/classifier/weights.safetensors", "flipped")
    with pytest.raises(StorageError, match=r"weights\.safetensors: was altered"):
        published(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_card_needs_a_licence(store: Path, tmp_path: Path) -> None:
    line = error_line(here("export", str(store), "--to", str(tmp_path / "out")), 2)
    assert "--licence is missing" in line
    assert "CC-BY-4.0" in line
    with pytest.raises(ExportRefused, match="--licence all rights: expected an SPDX identifier"):
        export(Request(str(store), str(tmp_path / "out"), "all rights"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["notes.txt", "zarr.json"])
def test_a_folder_that_holds_something_else_is_taken(store: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(StorageError, match=f"is taken: {name} there .*; choose another name"):
        published(store, tmp_path / "out")
    assert (tmp_path / "out" / name).read_text() == "mine"


def test_a_destination_inside_the_source_and_what_is_no_source_are_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="lies in what is to be exported"):
        published(store, store / "out")
    with pytest.raises(StorageError, match="no functaset there"):
        published(tmp_path, Path("/nowhere"))
    with pytest.raises(StorageError, match="nothing is committed yet"):
        new_store(tmp_path / "empty")
        published(tmp_path / "empty", tmp_path / "out")


@pytest.mark.faults
def test_an_interrupted_export_continues_and_keeps_an_edited_card(store: Path, tmp_path: Path) -> None:
    out = published(store, tmp_path / "out")
    (out / "README.md").write_text("---\nlicense: mit\n---\nOur words.\n")
    before = tree(out)
    (out / "functa.json").unlink()
    (out / "zarr.json").unlink()
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    published(store, out)
    assert tree(out) == before
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_an_export_is_exported_again_as_it_is(store: Path, tmp_path: Path) -> None:
    out = published(store, tmp_path / "out")
    (out / "README.md").write_text("Our words.\n")
    export(Request(str(out), str(tmp_path / "again")))
    assert tree(tmp_path / "again") == tree(out)
    with pytest.raises(ExportRefused, match=r"--licence CC0-1\.0: this is an export under MIT already"):
        export(Request(str(out), str(tmp_path / "third"), "CC0-1.0"))
    damage(out / "zarr.json", "flipped")
    with pytest.raises(StorageError, match=r"zarr.json: was altered.* delete .*functa.json"):
        export(Request(str(out), str(tmp_path / "third")))
