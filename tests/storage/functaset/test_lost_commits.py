"""Lost commits, marks and receipts are damage that is named: nothing is collected, no reader shows fewer rows."""

import shutil
from pathlib import Path

import pytest

from functa.storage.errors import DamagedObject, StorageError
from functa.storage.functaset.commit import commit, retire
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.history import latest, versions
from functa.storage.places.location import Location
from functa.storage.upkeep.gc import collect
from functa.storage.upkeep.status import status
from functa.storage.upkeep.verify import verify
from tests.helpers.storage.functasets import fill, filled, new_store, plan, table_of, tree, write
from tests.storage.upkeep.test_gc import later, names, shown

FIRST, MIDDLE, NEWEST = 1, 2, 3


@pytest.fixture
def place(tmp_path: Path) -> Location:
    """Version 2 has five more images in a fragment of its own, which version 3 retires: version 2 alone shows it."""
    place = filled(tmp_path / "s")
    more = plan(place, n=5, first=20)
    fill(place, [more])
    commit(place, [], {more.id: range(5)})
    return place


def lose(place: Location, *lost: int, marks: bool = True, numbers: bool = False) -> None:
    for version in lost:
        place.delete(f"commits/{version:08d}.json")
        if marks:
            place.delete(f"commits/{version:08d}.sha256")
        if numbers:
            place.delete(f"versions/{version:08d}")


def as_older_versions_wrote(place: Location) -> None:
    shutil.rmtree(Path(place.uri, "versions"))


def assert_nothing_is_collected(place: Location, match: str) -> None:
    before = tree(place.uri)
    for delete in (False, True):
        for more in ({}, {"keep_versions": 3}, {"erase_retired": True}):
            with pytest.raises(DamagedObject, match=match) as error:
                collect(place, delete=delete, now=later, older_than=0, **more)  # type: ignore[arg-type]
            assert "\n" not in str(error.value)
    assert tree(place.uri) == before


def bad(place: Location) -> set[str]:
    return {each["path"] for each in verify(place).bad}


@pytest.mark.parametrize("marks", [True, False])
@pytest.mark.parametrize("lost", [(NEWEST,), (MIDDLE, NEWEST), (FIRST, MIDDLE, NEWEST)])
def test_a_lost_newest_commit_is_damage_to_readers_and_committers_and_nothing_is_collected(
    lost: tuple[int, ...], marks: bool, place: Location
) -> None:
    shutil.copytree(Path(place.uri, "commits"), Path(place.uri).with_name("copy"))
    lose(place, *lost, marks=marks)
    missing = r"commits/00000003\.json: is missing; restore it from a copy"
    for act in (Functaset.open, latest, lambda place: commit(place, []), lambda p: retire(p, "train", names(0, 1))):
        with pytest.raises(DamagedObject, match=missing):
            act(place)
    assert {f"commits/{version:08d}.json" for version in lost} <= bad(place)
    assert any("commits/00000003.json: is missing" in line for line in status(place)["damage"])
    assert_nothing_is_collected(place, missing)
    shutil.copytree(Path(place.uri).with_name("copy"), Path(place.uri, "commits"), dirs_exist_ok=True)
    assert bad(place) == set()
    assert shown(place) == names(0, 20)


@pytest.mark.attacks
def test_a_lost_commits_folder_is_damage_and_nothing_is_collected(place: Location) -> None:
    shutil.move(Path(place.uri, "commits"), Path(place.uri).with_name("aside"))
    with pytest.raises(DamagedObject, match=r"commits/00000003\.json: is missing"):
        Functaset.open(place)
    assert_nothing_is_collected(place, r"commits/00000003\.json: is missing")
    shutil.move(Path(place.uri).with_name("aside"), Path(place.uri, "commits"))
    assert shown(place) == names(0, 20)


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("marks", [True, False])
@pytest.mark.parametrize("lost", [(FIRST,), (MIDDLE,), (FIRST, MIDDLE)])
def test_a_lost_older_commit_is_damage_that_is_named_and_what_it_shows_is_kept_until_it_expires(
    lost: tuple[int, ...], marks: bool, older: bool, place: Location
) -> None:
    if older:
        as_older_versions_wrote(place)
    lose(place, *lost, marks=marks)
    assert {f"commits/{version:08d}.json" for version in lost} <= bad(place)
    for version in lost:
        with pytest.raises(DamagedObject, match=rf"commits/0000000{version}\.json: is missing"):
            Functaset.open(place, version)
    assert shown(place) == names(0, 20)
    if MIDDLE in lost:
        assert_nothing_is_collected(place, "is missing; restore it from a copy, or expire it and those before it")
        kept = len(place.list("fragments/"))
        assert collect(place, delete=True, keep_versions=1, now=later).versions[-1:] == [NEWEST]
        assert len(place.list("fragments/")) < kept
    else:
        with pytest.raises(DamagedObject, match="--keep-versions 2"):
            collect(place, delete=True, now=later)
        collect(place, delete=True, keep_versions=2, now=later)
    assert bad(place) == set()
    assert shown(place) == names(0, 20)


def test_an_older_versions_functaset_whose_newest_commits_are_lost_keeps_what_was_claimed_for_them(
    place: Location,
) -> None:
    as_older_versions_wrote(place)
    lose(place, MIDDLE, NEWEST)
    match = "holds no commit after 1, though 1 fragments that none names were claimed for one, so nothing is collected"
    assert_nothing_is_collected(place, match)
    lose(place, FIRST)
    assert_nothing_is_collected(place, "holds no commit, though 3 fragments that none names were claimed for one")


def test_a_killed_commit_is_no_lost_one(place: Location) -> None:
    """Its fragment was claimed, and no number shows that the commit was made."""
    abandoned = plan(place, n=4, first=60)
    write(place, abandoned, 0)
    place.create(f"{abandoned.path}/claim", b"commit")
    assert collect(place, delete=True, now=later).fragments == [abandoned.id]
    assert bad(place) == set()


@pytest.mark.parametrize("number", [True, False])
def test_a_committer_killed_before_the_mark_of_its_commit_does_not_stop_a_collection(
    number: bool, place: Location
) -> None:
    abandoned = plan(place, n=4, first=60)
    write(place, abandoned, 0)
    place.create(f"{abandoned.path}/claim", b"commit")
    place.delete("commits/00000003.sha256")
    if not number:
        place.delete("versions/00000003")
    assert collect(place, delete=True, now=later).fragments == [abandoned.id]
    assert bad(place) == set()


def test_marks_and_numbers_that_are_missing_are_written_again_by_the_next_commit(place: Location) -> None:
    place.delete("commits/00000003.sha256")
    as_older_versions_wrote(place)
    assert bad(place) == set()
    retire(place, "train", names(0, 1))
    assert place.list("versions/") == ["versions/00000003", "versions/00000004"]
    assert place.exists("commits/00000003.sha256")
    assert versions(place) == [1, 2, 3, 4]


@pytest.mark.parametrize("shard", [0, 1, 2])
def test_a_lost_receipt_is_named_and_readers_have_what_it_held_in_the_manifest(shard: int, place: Location) -> None:
    fragment = next(each for each in Functaset.open(place).fragments if each.split == "train")
    expected = Functaset.open(place).info()
    key = f"{fragment.plan.path}/receipts/{shard:06d}.0.json"
    place.delete(key)
    assert bad(place) == {key}
    assert status(place)["damage"] == [f"{place.uri}/{key}: is missing"]
    assert Functaset.open(place).info() == expected
    assert shown(place) == names(0, 20)
    before = tree(place.uri)
    assert collect(place, delete=True, now=later).removed == []
    assert tree(place.uri) == before


def test_a_lost_manifest_is_damage_that_is_named_and_no_row_is_left_out(place: Location) -> None:
    key = f"{Functaset.open(place).fragments[0].plan.path}/manifest.safetensors"
    place.delete(key)
    assert bad(place) == {key}
    assert any(f"{key}: is missing" in line for line in status(place)["damage"])
    for read in (lambda store: store.load("train"), lambda store: store.info(), lambda store: store.content):
        with pytest.raises(StorageError, match=f"{key}: is missing"):
            read(Functaset.open(place))
    before = tree(place.uri)
    assert collect(place, delete=True, now=later).removed == []
    assert tree(place.uri) == before


def test_a_lost_receipt_of_a_shard_that_is_wholly_retired_is_no_damage(place: Location) -> None:
    fragment = next(each for each in Functaset.open(place).fragments if each.split == "train")
    retire(place, "train", table_of(place, fragment.plan, 1).keys)
    place.delete(f"{fragment.plan.path}/receipts/000001.0.json")
    assert status(place)["damage"] == []
    assert bad(place) == set()


def test_what_an_encoding_wrote_into_a_deleted_folder_is_refused_by_the_next_one(tmp_path: Path) -> None:
    """Its shards may lack objects that were deleted with the plan."""
    place = new_store(tmp_path / "s")
    each = plan(place)
    write(place, each, 0)
    place.delete(f"{each.path}/plan.json")
    with pytest.raises(DamagedObject, match=rf"{each.path}: has receipts of shards and no plan.*; delete it, then run"):
        plan(place)
    shutil.rmtree(tmp_path / "s" / each.path)
    fill(place, [plan(place)])
    assert shown(place) == names(0, 20)
