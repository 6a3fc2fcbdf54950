"""Every way to spoil a store on disk: verify --deep names the object, and the reader raises instead of inventing."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from functa.storage.errors import StorageError
from functa.storage.functaset.fragment import Fragment
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.records import vouch
from functa.storage.places.address import open_location
from functa.storage.upkeep.verify import verify
from tests.helpers.storage.functasets import filled, new_store, plan

pytestmark = pytest.mark.attacks


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def edit(path: Path) -> None:
    """A digit of a record, as somebody would who wants another number there."""
    text = path.read_text()
    at = max(i for i, c in enumerate(text) if c in "12345678" and text[i - 1] in " ,:[")
    path.write_text(f"{text[:at]}9{text[at + 1 :]}")


TAMPERING: dict[str, Callable[[Path], object]] = {
    "one flipped bit": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}
OBJECTS = {
    "shard": "z/c/1/0/0/0",
    "labels": "label/c/0",
    "ids": "id/c/2/0",
    "psnr": "psnr/c/1",
    "manifest": "manifest.safetensors",
    "plan": "plan.json",
    "array metadata": "z/zarr.json",
    "range": "quantization/low/c/0/0/0",
    "range metadata": "quantization/step/zarr.json",
}


def training_fragment(folder: Path) -> Path:
    commit = json.loads((folder / "commits" / "00000001.json").read_text())
    return folder / "fragments" / next(e["fragment"] for e in commit["fragments"] if e["split"] == "train")


def assert_found(folder: Path, path: Path) -> None:
    """Check that verify --deep lists its path, and that the reader names it."""
    relative = str(path.relative_to(folder))
    report = verify(open_location(str(folder)), deep=True)
    assert relative in [bad["path"] for bad in report.bad]
    with pytest.raises(StorageError) as error:
        Functaset.open(str(folder)).load("train")
    assert relative in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.faults
@pytest.mark.parametrize("tampering", TAMPERING)
@pytest.mark.parametrize("what", OBJECTS)
def test_damage_to_what_a_reader_reads_is_found_and_named(tmp_path: Path, what: str, tampering: str) -> None:
    filled(tmp_path / "s")
    path = training_fragment(tmp_path / "s") / OBJECTS[what]
    TAMPERING[tampering](path)
    assert_found(tmp_path / "s", path)


@pytest.mark.parametrize("tampering", TAMPERING)
@pytest.mark.parametrize("key", ["commits/00000001.json", "zarr.json"])
def test_damage_to_the_records_of_the_store_is_found_and_named(tmp_path: Path, key: str, tampering: str) -> None:
    filled(tmp_path / "s")
    TAMPERING[tampering](tmp_path / "s" / key)
    try:
        named = [bad["path"] for bad in verify(open_location(str(tmp_path / "s")), deep=True).bad]
    except StorageError as error:
        named = [str(error)]
    assert any("commits" in name or key in name for name in named) or "nothing is committed" in named[0]
    with pytest.raises(StorageError):
        Functaset.open(str(tmp_path / "s")).load("train")


@pytest.mark.faults
@pytest.mark.parametrize("key", ["plan.json", "z/zarr.json", "rows/000000.json"])
def test_an_edited_number_in_a_record_is_found(tmp_path: Path, key: str) -> None:
    filled(tmp_path / "s")
    path = training_fragment(tmp_path / "s") / key
    edit(path)
    relative = str(path.relative_to(tmp_path / "s"))
    assert relative in [bad["path"] for bad in verify(open_location(str(tmp_path / "s")), deep=True).bad]
    with pytest.raises(StorageError, match=key):
        _ = Functaset.open(str(tmp_path / "s")).load("train").keys


@pytest.mark.faults
@pytest.mark.parametrize("tampering", [*TAMPERING, "an edited number", "swapped"])
def test_damage_to_a_receipt_is_found_and_named_and_hidden_from_no_reader(tmp_path: Path, tampering: str) -> None:
    filled(tmp_path / "s")
    expected = Functaset.open(str(tmp_path / "s")).load("train").dequantized()
    one, other = (training_fragment(tmp_path / "s") / f"receipts/00000{shard}.0.json" for shard in (0, 1))
    if tampering == "swapped":
        one.write_bytes(other.read_bytes())
    else:
        TAMPERING.get(tampering, edit)(one)
    for deep in (False, True):
        bad = [bad["path"] for bad in verify(open_location(str(tmp_path / "s")), deep=deep).bad]
        assert bad == [str(one.relative_to(tmp_path / "s"))]
    assert (Functaset.open(str(tmp_path / "s")).load("train").dequantized() == expected).all()


def test_an_edited_commit_is_found(tmp_path: Path) -> None:
    filled(tmp_path / "s")
    edit(tmp_path / "s" / "commits" / "00000001.json")
    assert verify(open_location(str(tmp_path / "s"))).bad[0]["path"] == "commits/00000001.json"
    with pytest.raises(StorageError, match=r"00000001\.json: was altered"):
        Functaset.open(str(tmp_path / "s"))


@pytest.mark.faults
@pytest.mark.parametrize("array", ["z", "label"])
def test_two_swapped_shards_are_found(tmp_path: Path, array: str) -> None:
    filled(tmp_path / "s")
    names = {"z": "c/{}/0/0/0", "label": "c/{}"}[array]
    one, other = (training_fragment(tmp_path / "s") / array / names.format(shard) for shard in (0, 1))
    first = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(first)
    assert_found(tmp_path / "s", one)
    bad = [bad["path"] for bad in verify(open_location(str(tmp_path / "s")), deep=True).bad]
    assert str(other.relative_to(tmp_path / "s")) in bad


@pytest.mark.parametrize("what", ["moments", "field"])
def test_damage_to_moments_and_field_is_found(tmp_path: Path, what: str) -> None:
    filled(tmp_path / "s")
    pattern = {"moments": "moments/*.f8", "field": "fields/*.safetensors"}[what]
    (path,) = (tmp_path / "s").glob(pattern)
    flip(path)
    relative = str(path.relative_to(tmp_path / "s"))
    assert [bad["path"] for bad in verify(open_location(str(tmp_path / "s")), deep=True).bad] == [relative]
    store = Functaset.open(str(tmp_path / "s"))
    with pytest.raises(StorageError, match=relative):
        store.moments() if what == "moments" else store.field()


@pytest.mark.faults
def test_without_deep_what_is_missing_or_short_is_still_found(tmp_path: Path) -> None:
    filled(tmp_path / "s")
    fragment = training_fragment(tmp_path / "s")
    (fragment / "z/c/0/0/0/0").unlink()
    (fragment / "label/c/1").write_bytes(b"")
    faults = {bad["path"]: bad["fault"] for bad in verify(open_location(str(tmp_path / "s"))).bad}
    assert faults == {
        f"fragments/{fragment.name}/z/c/0/0/0/0": "is missing",
        f"fragments/{fragment.name}/label/c/1": "has 0 bytes and should have 56",
    }


def test_a_whole_store_has_nothing_to_report(tmp_path: Path) -> None:
    report = verify(filled(tmp_path / "s"), deep=True)
    assert report.bad == []
    assert report.checked > 40


HOSTILE: dict[str, Callable[[dict], object]] = {  # type: ignore[type-arg]
    "unknown codec": lambda d: d["codecs"][0]["configuration"]["codecs"].append({"name": "pickle"}),
    "a codec twice": lambda d: d["codecs"][0]["configuration"]["codecs"].insert(1, {"name": "zstd"}),
    "another codec": lambda d: d["codecs"][0]["configuration"]["codecs"].insert(1, {"name": "blosc"}),
    "absurd shape": lambda d: d.update(shape=[1 << 40, 2, 2, 8]),
    "absurd shard": lambda d: d["chunk_grid"]["configuration"].update(chunk_shape=[1 << 40, 2, 2, 8]),
    "absurd chunk": lambda d: d["codecs"][0]["configuration"].update(chunk_shape=[1 << 40, 2, 2, 8]),
    "object type": lambda d: d.update(data_type="object"),
    "format 2": lambda d: d.update(zarr_format=2),
    "codecs that are not": lambda d: d.update(codecs="pickle"),
    "another key encoding": lambda d: d.update(chunk_key_encoding={"name": "v2"}),
}


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_metadata_that_its_own_records_vouch_for_is_refused_before_memory_is_taken(
    tmp_path: Path, hostile: str
) -> None:
    place = new_store(tmp_path / "s")
    each = plan(place)
    path = tmp_path / "s" / each.path / "z" / "zarr.json"
    document = json.loads(path.read_text())
    HOSTILE[hostile](document)
    path.write_text(json.dumps(document))
    forged = each.model_copy(update={"objects": each.objects | {"z/zarr.json": vouch(path.read_bytes())}})
    tracemalloc.start()
    try:
        with pytest.raises(StorageError, match=r"z/zarr\.json: "):
            Fragment(place, forged).document("z")
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.faults
def test_a_future_format_is_refused_not_guessed_at(tmp_path: Path) -> None:
    place = filled(tmp_path / "s")
    root = tmp_path / "s" / "zarr.json"
    root.write_text(root.read_text().replace('"functaset": 1', '"functaset": 2'))
    with pytest.raises(StorageError, match="format 2; this version reads 1: upgrade"):
        Functaset.open(place)


def test_a_zarr_group_that_is_no_functaset_is_refused(tmp_path: Path) -> None:
    (tmp_path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    with pytest.raises(StorageError, match="not a functaset"):
        Functaset.open(str(tmp_path))


def test_an_object_that_grew_is_not_read_into_memory(tmp_path: Path) -> None:
    filled(tmp_path / "s")
    path = training_fragment(tmp_path / "s") / "z/c/0/0/0/0"
    with path.open("r+b") as file:
        file.truncate(1 << 36)  # sparse: 64 GiB that no disk holds
    with pytest.raises(StorageError, match="has 68719476736 bytes and should have"):
        Functaset.open(str(tmp_path / "s")).load("train")
