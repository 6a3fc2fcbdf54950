"""gc at the same time as commits: nothing that is shown is collected, and nothing that is collected is shown."""

import os
import time
from pathlib import Path

import pytest

from functa.storage.errors import StorageError
from functa.storage.functaset.commit import commit, retire
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.plan import Plan
from functa.storage.places.location import Location
from functa.storage.upkeep.gc import DAY, collect
from functa.storage.upkeep.verify import verify
from tests.helpers.storage.functasets import fill, filled, plan, write
from tests.helpers.storage.overtaken import Deleting, Overtaken
from tests.storage.upkeep.test_gc import later, names, shown


def test_an_image_retired_while_others_are_erased_stays_retired_and_is_erased(tmp_path: Path) -> None:
    place = filled(tmp_path / "s")
    retire(place, "train", ["train/00003"])
    rival = Overtaken(place.uri, lambda: retire(place, "train", ["train/00007"]), "fragments/")
    collect(rival, erase_retired=True, delete=True)
    assert shown(place) == [key for key in names(0, 20) if key not in ("train/00003", "train/00007")]
    left = b"".join(path.read_bytes() for path in (tmp_path / "s").rglob("*") if path.is_file())
    assert b"train/00007" not in left
    assert verify(place, deep=True).bad == []


def test_retiring_holds_whatever_is_committed_meanwhile(tmp_path: Path) -> None:
    place = filled(tmp_path / "s")
    retire(place, "train", ["train/00001"])
    rival = Overtaken(place.uri, lambda: collect(place, erase_retired=True, delete=True), "moments/")
    retire(rival, "train", ["train/00002"])
    assert shown(place) == names(0, 1) + names(3, 17)


def test_a_fragment_that_gc_has_claimed_is_not_committed_and_its_name_not_used_again(tmp_path: Path) -> None:
    place = filled(tmp_path / "s")
    each = plan(place, n=2, first=50)
    write(place, each, 0)
    place.create(f"{each.path}/claim", b"collect")
    with pytest.raises(StorageError, match="was collected by gc; run the same command again"):
        commit(place, [each.id])
    again = plan(place, n=2, first=50)
    assert again.id not in (each.id, plan(place, n=2, first=52).id)
    fill(place, [again])
    assert plan(place, n=2, first=50) == again
    collect(place, now=later, delete=True)
    assert place.list(f"{each.path}/") == [f"{each.path}/claim"]
    assert collect(place, now=later, delete=True).removed == []
    assert len(shown(place)) == 22


def abandoned(place: Location) -> Plan:
    """Finished and never committed; its committer died after it had laid claim to it."""
    each = plan(place, n=4, first=60)
    write(place, each, 0)
    place.create(f"{each.path}/claim", b"commit")
    return each


def test_what_gc_removes_while_it_is_being_committed_is_not_committed(tmp_path: Path) -> None:
    place = filled(tmp_path / "s")
    each = abandoned(place)
    rival = Overtaken(place.uri, lambda: collect(place, now=later, delete=True), "commits/")
    with pytest.raises(StorageError, match=f"fragment {each.id}: has no plan; was it collected by gc"):
        commit(rival, [each.id])
    assert shown(place) == names(0, 20)
    assert verify(place, deep=True).bad == []
    assert place.list(f"{each.path}/") == [f"{each.path}/claim"]


def test_what_is_committed_before_gc_has_claimed_it_stays(tmp_path: Path) -> None:
    place = filled(tmp_path / "s")
    each = abandoned(place)
    rival = Overtaken(place.uri, lambda: commit(place, [each.id]), "fragments/")
    assert collect(rival, now=later, delete=True).fragments == []
    assert (tmp_path / "s" / each.path / "claim").read_bytes() == b"commit"
    assert shown(place) == names(0, 20) + names(60, 4)
    assert verify(place, deep=True).bad == []


def test_what_gc_has_claimed_is_not_committed_even_before_its_own_commit(tmp_path: Path) -> None:
    place = filled(tmp_path / "s")
    each = abandoned(place)
    refused = []

    def late() -> None:
        with pytest.raises(StorageError, match="was collected by gc"):
            commit(place, [each.id])
        refused.append(each.id)

    assert collect(Overtaken(place.uri, late, "commits/"), now=later, delete=True).fragments == refused
    assert shown(place) == names(0, 20)
    assert verify(place, deep=True).bad == []


class Dead(BaseException):
    """Acts as a SIGKILL: no code catches it."""


def die() -> None:
    raise Dead


def test_a_second_gc_after_one_that_was_killed_before_its_commit_shuts_out_committers_too(tmp_path: Path) -> None:
    place = filled(tmp_path / "s")
    each = abandoned(place)

    def collections() -> None:
        with pytest.raises(Dead):
            collect(Overtaken(place.uri, die, "commits/"), now=later, delete=True)
        assert place.read(f"{each.path}/claim") == b"collect"
        assert collect(place, now=later, delete=True).fragments == [each.id]

    with pytest.raises(StorageError, match="has no plan; was it collected by gc"):
        commit(Overtaken(place.uri, collections, "commits/"), [each.id])
    assert shown(place) == names(0, 20)
    assert verify(place, deep=True).bad == []


def test_a_slow_gc_takes_nothing_of_what_is_encoded_anew_after_a_fast_one(tmp_path: Path) -> None:
    place = filled(tmp_path / "s")
    each = abandoned(place)

    def fast() -> None:
        assert collect(place, now=later, delete=True).fragments == [each.id]
        fill(place, [plan(place, n=4, first=60)])

    collect(Deleting(place.uri, fast, each.path), now=later, delete=True)
    assert shown(place) == names(0, 20) + names(60, 4)
    assert verify(place, deep=True).bad == []


def moments_left_behind(folder: Path) -> tuple[Location, Plan, str]:
    """Return a store, a finished fragment, and the key of the moments of both: a killed committer left them there."""
    place, twin = filled(folder / "s"), filled(folder / "twin")
    more = [plan(where, n=4, first=60) for where in (place, twin)]
    for where, each in zip((place, twin), more):
        write(where, each, 0)
    stored = commit(twin, [more[1].id]).moments
    assert stored is not None
    place.create(stored.key, twin.read(stored.key))
    os.utime(folder / "s" / stored.key, (time.time() - 2 * DAY,) * 2)
    return place, more[0], stored.key


def test_moments_that_a_new_commit_names_while_gc_takes_them_are_put_back(tmp_path: Path) -> None:
    """The committer finds them there and looks again before gc deletes: then gc looks at the commits."""
    place, more, _ = moments_left_behind(tmp_path)

    def commits() -> None:
        commit(place, [more.id])
        retire(place, "train", ["train/00001"])  # the newest version has other moments

    collect(Deleting(place.uri, commits, "moments/"), delete=True)
    assert Functaset.open(place, 2).moments().count == 24
    assert verify(place, deep=True).bad == []


def test_a_claim_of_a_collection_that_was_killed_does_not_outlive_the_next(tmp_path: Path) -> None:
    place = filled(tmp_path / "s")
    entry = Functaset.open(place).commit.fragments[0]
    place.write(f"fragments/{entry.fragment}/claim", b"collect")
    assert collect(place, now=later, delete=True).removed == []
    assert place.read(f"fragments/{entry.fragment}/claim") == b"commit"
    assert shown(place) == names(0, 20)


@pytest.mark.parametrize("when", ["after the listing", "before the claim"])
def test_a_fragment_that_somebody_just_began_to_commit_is_left_alone(tmp_path: Path, when: str) -> None:
    place = filled(tmp_path / "s")
    each = plan(place, n=4, first=60)
    write(place, each, 0)
    long_ago = time.time() - 2 * DAY
    for path in (tmp_path / "s" / each.path).rglob("*"):
        os.utime(path, (long_ago, long_ago))
    at = "" if when == "after the listing" else f"{each.path}/claim"
    rival = Overtaken(place.uri, lambda: place.create(f"{each.path}/claim", b"commit"), at)
    done = collect(rival, delete=True)
    assert (done.fragments, done.young) == ([], [f"fragments/{each.id}"])
    commit(place, [each.id])
    assert shown(place) == names(0, 20) + names(60, 4)


def test_moments_that_gc_takes_while_a_commit_names_them_come_back(tmp_path: Path) -> None:
    place, more, key = moments_left_behind(tmp_path)
    taken: list[str] = []
    commit(Overtaken(place.uri, lambda: taken.extend(collect(place, delete=True).removed), "commits/"), [more.id])
    assert taken == [key]
    assert verify(place, deep=True).bad == []
    assert Functaset.open(place).moments().count == 24
