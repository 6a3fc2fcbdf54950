"""One commit: what it refuses and names, what its record holds, and when there is nothing to record."""

import hashlib
import shutil
from pathlib import Path

import pytest

from functa.storage.errors import DamagedObject, StorageError
from functa.storage.functaset import commit as committing
from functa.storage.functaset.commit import commit, retire
from functa.storage.functaset.fragment import Fragment
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.history import Commit, commit_key, latest, mark_key
from functa.storage.functaset.plan import Plan
from functa.storage.functaset.planning import plan_fragment
from functa.storage.functaset.receipts.manifest import ManifestWriter, manifest_key
from functa.storage.places.address import open_location
from functa.storage.places.location import Location
from functa.storage.upkeep.verify import verify
from tests.helpers.storage.functasets import SHAPE, filled, new_store, plan, shard_of, write


@pytest.fixture
def place(tmp_path: Path) -> Location:
    """A functaset without a commit."""
    return new_store(tmp_path / "s")


def written(place: Location, **changes: object) -> Plan:
    """Return a fragment whose every shard is finished."""
    made = plan(place, **changes)  # type: ignore[arg-type]
    for shard in range(made.shards):
        write(place, made, shard)
    return made


def test_at_least_the_newest_version_is_kept(place: Location) -> None:
    each = written(place)
    with pytest.raises(ValueError, match="keep_versions 0: the newest one is kept at least"):
        commit(place, [each.id], keep_versions=0)
    assert latest(place) is None
    assert commit(place, [each.id], keep_versions=1).oldest == 1


def test_a_functaset_without_rows_is_committed_only_on_request(place: Location) -> None:
    with pytest.raises(StorageError, match="nothing to commit; encode first"):
        commit(place, [])
    made = commit(place, [], again=True)
    assert (made.version, made.fragments, made.moments, made.parent) == (1, (), None, None)


def test_a_fragment_of_another_fingerprint_is_refused(place: Location, tmp_path: Path) -> None:
    each = written(new_store(tmp_path / "other", {"field": "another"}))
    shutil.copytree(tmp_path / "other" / each.path, tmp_path / "s" / each.path)
    with pytest.raises(StorageError, match="was planned for another fingerprint; encode it again"):
        commit(place, [each.id])


def test_a_fragment_with_an_unfinished_shard_is_refused(place: Location) -> None:
    each = plan(place)
    for shard in (0, 2):
        write(place, each, shard)
    with pytest.raises(StorageError, match="shard 1 of 3 is not finished; encode it first"):
        commit(place, [each.id])
    assert latest(place) is None


@pytest.mark.parametrize("how", ["missing", "short"])
def test_a_fragment_of_which_an_object_is_missing_or_short_is_refused(place: Location, how: str) -> None:
    each = written(place)
    receipt = shard_of(place, each, 1).find_receipt()
    assert receipt is not None
    key = f"{each.path}/{min(receipt.objects)}"
    data = place.read(key)
    place.delete(key)
    if how == "short":
        place.write(key, data[:-1])
    with pytest.raises(DamagedObject, match="is missing or short; restore it, or encode in a new root"):
        commit(place, [each.id])


def test_latents_of_two_shapes_are_refused(place: Location) -> None:
    both = [written(place, bits=32), written(place, bits=32, n=4, first=60, latent_shape=(1, 1, 8))]
    with pytest.raises(StorageError, match=r"latents \(1, 1, 8\) beside others of shape \(2, 2, 8\)"):
        commit(place, [each.id for each in both])


@pytest.mark.parametrize("row", [-1, 20])
def test_a_row_that_a_fragment_does_not_have_is_refused(place: Location, row: int) -> None:
    each = written(place)
    commit(place, [each.id])
    with pytest.raises(StorageError, match=f"has rows 0 to 19; {max(row, 3)} cannot be retired"):
        commit(place, [], {each.id: [row, 3]})
    made = commit(place, [], {each.id: [0, 19]})
    assert made.fragments[0].retired == ((0, 1), (19, 20))


def test_good_and_bad_rows_are_counted_apart_and_retired_ones_not_at_all(place: Location) -> None:
    each = plan(place)
    for shard in range(each.shards):
        write(place, each, shard, bad={1: "is empty"})
    made = commit(place, [each.id])
    assert [(entry.rows, entry.bad) for entry in made.fragments] == [(17, 3)]
    made = commit(place, [], {each.id: [0, 1]})  # a good one and a bad one
    assert [(entry.rows, entry.bad) for entry in made.fragments] == [(16, 2)]
    assert made.moments is not None
    assert made.moments.count == 16


def test_what_changes_nothing_is_no_commit(place: Location) -> None:
    each = written(place)
    first = commit(place, [each.id])
    assert commit(place, [each.id]) == first
    assert commit(place, []) == first
    second = commit(place, [], {each.id: [4]})
    assert second.version == 2
    assert commit(place, [each.id], {each.id: [4]}) == second
    assert commit(place, [], again=True).version == 3


def test_a_commit_names_its_parent_and_is_marked_by_its_own_digest(place: Location) -> None:
    each = written(place)
    first = commit(place, [each.id])
    second = commit(place, [], {each.id: [4]})
    digests = [hashlib.sha256(place.read(commit_key(version))).hexdigest() for version in (1, 2)]
    assert (first.parent, second.parent) == (None, digests[0])
    assert [place.read(mark_key(version)).decode() for version in (1, 2)] == digests
    place.delete(mark_key(2))  # its committer was killed before it
    commit(place, [], {each.id: [5]})
    assert place.read(mark_key(2)).decode() == digests[1]


def test_versions_expire_beyond_those_that_are_kept(place: Location) -> None:
    each = written(place)
    commit(place, [each.id])
    oldest = [commit(place, [], {each.id: [row]}, keep_versions=2).oldest for row in (1, 2, 3)]
    assert oldest == [1, 2, 3]
    assert commit(place, [], {each.id: [9]}).oldest == 3  # what has expired does not come back


def test_a_fragment_without_any_row_left_is_retired_and_stays_so(place: Location) -> None:
    both = [written(place), written(place, n=4, first=60)]
    commit(place, [each.id for each in both])
    made = commit(place, [], {both[1].id: range(4)})
    assert [entry.fragment for entry in made.fragments] == [both[0].id]
    assert made.retired_fragments == (both[1].id,)
    assert commit(place, [both[1].id]) == made


def test_retiring_names_an_image_that_was_never_shown(tmp_path: Path) -> None:
    place = filled(tmp_path / "s")
    with pytest.raises(StorageError, match=r"shows no image 'train/77777' in split 'train'; .* lists the keys"):
        retire(place, "train", ["train/00003", "train/77777"])
    made = retire(place, "train", ["train/00003"])
    assert retire(place, "train", ["train/00003"]) == made
    assert "train/00003" not in Functaset.open(place).load("train").keys
    with pytest.raises(StorageError, match="shows no image 'train/00003' in split 'test'"):
        retire(place, "test", ["train/00003"])


def test_only_new_fragments_of_a_split_are_compared_and_each_image_of_them(place: Location) -> None:
    commit(place, [written(place).id])
    twice = written(place, n=4, first=18)
    with pytest.raises(StorageError, match=r"2 of its images, such as train/000(18|19), are visible already"):
        commit(place, [twice.id])
    assert commit(place, [written(place, n=4, first=20).id]).version == 2
    assert Fragment.load(place, twice.id).plan == twice


def test_every_single_image_that_is_shown_is_refused_again(place: Location) -> None:
    """A fragment's first and last name are found too."""
    commit(place, [written(place).id])
    for first in range(20):
        with pytest.raises(StorageError, match=f"1 of its images, such as train/{first:05}, are visible already"):
            commit(place, [written(place, n=1, first=first).id])


def test_the_new_fragments_of_one_commit_are_compared_with_each_other(place: Location) -> None:
    one, other = written(place, n=4), written(place, n=4, first=3)
    with pytest.raises(StorageError, match="1 of its images, such as train/00003, are visible already"):
        commit(place, [one.id, other.id])
    assert commit(place, [one.id]).version == 1


def test_an_image_is_shown_once_in_each_split(place: Location) -> None:
    commit(place, [written(place).id])
    rows = shard_of(place, written(place, n=4), 0).table()
    made = plan_fragment(
        place, rows, split="test", latent_shape=SHAPE, shard_rows=8, chunk_rows=4, quantizer=None, codec="zstd"
    ).plan
    write(place, made, 0)
    assert {entry.split for entry in commit(place, [made.id]).fragments} == {"train", "test"}
    left = {entry.split: entry.rows for entry in retire(place, "test", [rows.keys[0]]).fragments}
    assert left == {"train": 20, "test": 3}


@pytest.mark.faults
@pytest.mark.parametrize("found", [b"", b"x", None, b"x" * 1_000_000], ids=["empty", "short", "of its length", "long"])
def test_what_lies_damaged_where_a_commit_writes_is_replaced(place: Location, found: bytes | None) -> None:
    other = new_store(Path(str(place.uri)).parent / "whole")
    made = written(place)
    written(other)
    commit(other, [made.id])
    whole = other.read(manifest_key(made.id))
    place.write(manifest_key(made.id), bytes(len(whole)) if found is None else found)
    commit(place, [made.id])
    assert place.read(manifest_key(made.id)) == whole
    assert verify(place, deep=True).bad == []


def test_what_a_commit_names_is_there_before_the_commit(place: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    create, there = committing.create_record, []

    def watched(location: Location, key: str, record: Commit, fewer: str) -> bool:
        assert record.moments is not None
        there.append(location.exists(record.moments.key))
        return create(location, key, record, fewer)

    monkeypatch.setattr(committing, "create_record", watched)
    commit(place, [written(place).id])
    assert there == [True]


def test_a_receipt_that_no_manifest_can_hold_is_named(place: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("does not name z")

    monkeypatch.setattr(ManifestWriter, "add", refuse)
    with pytest.raises(DamagedObject, match=r"receipts/000000\.0\.json: does not name z; encode the shard again"):
        commit(place, [written(place).id])


def test_a_bad_row_that_is_retired_is_no_longer_counted(place: Location) -> None:
    made = plan(place)
    for shard in range(made.shards):
        write(place, made, shard, {2: "not finite"} if shard == 1 else None)
    (entry,) = commit(place, [made.id]).fragments
    assert (entry.rows, entry.bad) == (19, 1)
    (entry,) = commit(place, [], {made.id: [10, 11]}).fragments
    assert (entry.rows, entry.bad) == (18, 0)


def test_an_image_that_was_never_good_is_no_retired_one(place: Location) -> None:
    made = plan(place, n=8)
    write(place, made, 0, {2: "not finite"})
    commit(place, [made.id])
    good, bad = (shard_of(place, made, 0).table().keys[row] for row in (1, 2))
    retire(place, "train", [good])
    with pytest.raises(StorageError, match=f"shows no image '{bad}'"):
        retire(place, "train", [good, bad])


def test_nothing_is_retired_where_there_is_no_functaset(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no functaset"):
        retire(open_location(str(tmp_path)), "train", ["train/00003"])
