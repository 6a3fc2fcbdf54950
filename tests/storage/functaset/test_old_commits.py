"""Commits of format 1, which name every receipt: read, checked, added to, retired from, collected and compacted."""

import hashlib
import json
from pathlib import Path

import pytest

from functa.storage.errors import DamagedObject
from functa.storage.functaset.commit import commit, retire
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.history import commit_key, load_commit, mark_key
from functa.storage.functaset.records import canonical
from functa.storage.places.location import Location
from functa.storage.upkeep.compact import compact
from functa.storage.upkeep.gc import collect
from functa.storage.upkeep.status import status
from functa.storage.upkeep.verify import verify
from tests.helpers.storage.functasets import filled, flip_in, plan, write

MANIFEST = "{}/manifest.safetensors"


@pytest.fixture
def place(tmp_path: Path) -> Location:
    """A functaset as version 0.1 committed it."""
    made = filled(tmp_path / "s")
    record = json.loads(made.read(commit_key(1)))
    fragments = {fragment.id: fragment for fragment in Functaset.open(made).fragments}
    for entry in record["fragments"]:
        fragment = fragments[entry["fragment"]]
        entry["receipts"] = [each.model_dump() for each in fragment.receipt_records]
        del entry["manifest"], entry["names"]
        made.delete(MANIFEST.format(fragment.plan.path))
    del record["lists"], record["checksum"]
    record["format"] = 1
    record["checksum"] = hashlib.sha256(canonical(record)).hexdigest()
    data = json.dumps(record, sort_keys=True, indent=1).encode() + b"\n"
    made.write(commit_key(1), data)
    made.write(mark_key(1), hashlib.sha256(data).hexdigest().encode())
    return made


def keys(place: Location) -> list[str]:
    store = Functaset.open(place)
    return sorted(key for split in store.splits for key in store.load(split).keys)


def test_it_is_read_and_checked(place: Location) -> None:
    store = Functaset.open(place)
    assert store.commit.format == 1
    assert len(keys(place)) == 26
    assert store.info()["rows_by_split"] == {"train": 20, "test": 6}
    assert status(place)["damage"] == []
    assert verify(place, deep=True).bad == []
    assert collect(place, delete=True).removed == []
    receipt = store.fragments[0].shards[0].receipt_key
    flip_in(place, receipt)
    assert [bad["path"] for bad in verify(place).bad] == [receipt]
    with pytest.raises(DamagedObject, match=receipt):
        Functaset.open(place).load(store.fragments[0].split)


def test_the_next_commit_names_manifests_and_shows_the_same(place: Location) -> None:
    before, content = keys(place), Functaset.open(place).content
    assert commit(place, [Functaset.open(place).fragments[0].id]).version == 1  # nothing changes
    moments = Functaset.open(place).commit.moments
    made = commit(place, [], again=True)
    assert [(bool(entry.manifest), bool(entry.names)) for entry in made.fragments] == [(True, True), (True, True)]
    assert made.moments == moments
    assert keys(place) == before
    assert Functaset.open(place).content == content
    assert load_commit(place, 1).fragments[0].receipts
    assert verify(place, deep=True).bad == []


def test_images_are_added_and_retired_and_all_is_compacted_and_collected(place: Location) -> None:
    more = plan(place, n=5, first=20)
    write(place, more, 0)
    assert commit(place, [more.id]).version == 2
    retire(place, "train", ["train/00003"])
    expected = sorted({*(f"train/{row:05d}" for row in range(25)), *(f"test/{row:05d}" for row in range(6))})
    expected.remove("train/00003")
    assert keys(place) == expected
    compact(place)
    assert keys(place) == expected
    collect(place, delete=True, keep_versions=1)
    assert keys(place) == expected
    assert verify(place, deep=True).bad == []


def test_a_fragment_with_a_damaged_receipt_keeps_its_entry_until_it_is_repaired(place: Location) -> None:
    fragment = next(each for each in Functaset.open(place).fragments if each.split == "train")
    flip_in(place, fragment.shards[1].receipt_key)
    made = commit(place, [], again=True)
    assert {entry.split: bool(entry.manifest) for entry in made.fragments} == {"train": False, "test": True}
    assert [bad["path"] for bad in verify(place).bad] == [fragment.shards[1].receipt_key]


def test_an_image_that_it_shows_is_not_committed_again(place: Location) -> None:
    again = plan(place, n=2, first=19)
    write(place, again, 0)
    with pytest.raises(Exception, match="1 of its images, such as train/00019, are visible already"):
        commit(place, [again.id])
