"""Several at work on one functaset at once: writers, committers, whoever retires, repairs or collects."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from functa.storage.errors import StorageError
from functa.storage.functaset.commit import commit, retire
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.history import latest
from functa.storage.functaset.plan import Plan, RowTable
from functa.storage.functaset.planning import plan_fragment
from functa.storage.places.local import LocalLocation
from functa.storage.places.location import Entry, Location
from functa.storage.upkeep.gc import DAY, collect
from functa.storage.upkeep.verify import verify
from tests.helpers.storage.functasets import fill, filled, latents_of, new_store, plan, table_of, tree, write
from tests.helpers.storage.locations import Home
from tests.storage.upkeep.test_gc import later, names, shown


@dataclass(frozen=True)
class Overtaken(LocalLocation):
    """Somebody else acts before our first object of a kind is put, or replaced."""

    act: Callable[[], object] = lambda: None
    at: str = ""
    done: list[bool] = field(default_factory=list)

    def create(self, key: str, data: bytes) -> bool:
        if key.startswith(self.at) and not self.done:
            self.done.append(True)
            self.act()
        return super().create(key, data)

    def write(self, key: str, data: bytes) -> None:
        if key.startswith(self.at) and not self.done:
            self.done.append(True)
            self.act()
        super().write(key, data)

    def leftovers(self) -> list[Entry]:
        if not self.at:
            self.act()
        return super().leftovers()


def test_of_two_committers_the_loser_commits_on_top(tmp_path: Path) -> None:
    place = new_store(tmp_path / "s")
    mine, theirs = plan(place, n=5), plan(place, n=5, first=5)
    for each in (mine, theirs):
        write(place, each, 0)
    made = commit(Overtaken(place.uri, lambda: commit(place, [theirs.id]), "commits/"), [mine.id])
    assert made.version == 2
    assert [entry.fragment for entry in made.fragments] == [theirs.id, mine.id]
    assert len(Functaset.open(place).load("train")) == 10


def test_committers_of_the_same_images_never_both_win(tmp_path: Path) -> None:
    place = new_store(tmp_path / "s")
    mine, theirs = plan(place, n=5), plan(place, n=5, first=3)
    for each in (mine, theirs):
        write(place, each, 0)
    with pytest.raises(StorageError, match="visible already"):
        commit(Overtaken(place.uri, lambda: commit(place, [theirs.id]), "commits/"), [mine.id])
    assert sorted(Functaset.open(place).load("train").keys)[0] == "train/00003"


def test_many_committers_at_once_all_end_visible(home: Home) -> None:
    place = new_store(home / "s")
    plans = [plan(place, n=2, first=2 * i) for i in range(5)]
    for each in plans:
        write(place, each, 0)
    barrier = threading.Barrier(len(plans))

    def committer(fragment: str) -> None:
        barrier.wait()
        commit(place, [fragment])

    threads = [threading.Thread(target=committer, args=(each.id,)) for each in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store = Functaset.open(place)
    assert store.version == 5
    assert sorted(store.load("train").keys) == [f"train/{i:05d}" for i in range(10)]
    assert verify(place, deep=True).bad == []


def test_an_image_retired_while_others_are_erased_stays_retired_and_is_erased(tmp_path: Path) -> None:
    place = filled(tmp_path / "s")
    retire(place, "train", ["train/00003"])
    rival = Overtaken(place.uri, lambda: retire(place, "train", ["train/00007"]), "fragments/")
    collect(rival, erase_retired=True, delete=True)
    assert shown(place) == [key for key in names(0, 20) if key not in ("train/00003", "train/00007")]
    left = b"".join(path.read_bytes() for path in (tmp_path / "s").rglob("*") if path.is_file())
    assert b"train/00007" not in left
    assert verify(place, deep=True).bad == []


def test_an_image_retired_while_its_shard_is_repaired_stays_retired(tmp_path: Path) -> None:
    place = filled(tmp_path / "s")
    entry, each = Functaset.open(place).commit.fragments[0], Functaset.open(place).fragments[0].plan
    keys = table_of(place, each, 0).keys
    repaired = plan_again(place, keys, each.id)
    retire(place, "train", [keys[2]])
    commit(place, [repaired.id], {entry.fragment: range(8)})
    assert shown(place) == sorted(set(names(0, 20)) - {keys[2]})
    other = plan_again(place, keys[:2], each.id)
    commit(place, [], {entry.fragment: range(20), repaired.id: range(repaired.rows)})
    with pytest.raises(StorageError, match="the fragment that it replaces is no longer shown"):
        commit(place, [other.id])


def plan_again(place: Location, keys: list[str], replaces: str) -> Plan:
    labels = np.array([int(key[-5:]) % 10 for key in keys], np.int32)
    plan = plan_fragment(
        place, RowTable.of(keys, labels, keys), split="train", latent_shape=(2, 2, 8), shard_rows=8,
        chunk_rows=4, quantizer=Functaset.open(place).quantizer(replaces), replaces=replaces,
    ).plan  # fmt: skip
    for shard in range(plan.shards):
        write(place, plan, shard)
    return plan


def test_an_image_that_is_retired_while_a_newer_version_of_it_is_encoded_stays_away(tmp_path: Path) -> None:
    place = filled(tmp_path / "s")
    entry, each = Functaset.open(place).commit.fragments[0], Functaset.open(place).fragments[0].plan
    keys = [key for shard in range(3) for key in table_of(place, each, shard).keys]
    newer = plan(place, n=2, first=4, shard_rows=4)
    write(place, newer, 0)
    retire(place, "train", ["train/00004"])
    made = commit(place, [newer.id], {entry.fragment: [keys.index("train/00004"), keys.index("train/00005")]})
    assert newer.id in [each.fragment for each in made.fragments]
    assert shown(place) == sorted(set(names(0, 20)) - {"train/00004"})
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


def test_a_delayed_commit_does_not_take_the_number_of_an_expired_version(tmp_path: Path) -> None:
    place = filled(tmp_path / "s")
    mine = plan(place, n=4, first=60)
    write(place, mine, 0)

    def others() -> None:
        retire(place, "train", ["train/00003"])
        assert collect(place, erase_retired=True, delete=True).versions == [1, 2]

    made = commit(Overtaken(place.uri, others, "commits/"), [mine.id])
    assert made == latest(place)
    assert made.version == 4
    assert "train/00060" in shown(place)
    for version in (1, 2):
        with pytest.raises(StorageError, match=f"version {version} has expired; versions: 3, 4$"):
            Functaset.open(place, version)
    assert collect(place, now=later, delete=True).fragments == []


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


@dataclass(frozen=True)
class Deleting(Overtaken):
    """Somebody else acts before our first deletion of a kind."""

    def create(self, key: str, data: bytes) -> bool:
        return LocalLocation.create(self, key, data)

    def write(self, key: str, data: bytes) -> None:
        LocalLocation.write(self, key, data)

    def delete(self, key: str) -> None:
        if key.startswith(self.at) and not self.done:
            self.done.append(True)
            self.act()
        super().delete(key)


def test_moments_that_a_new_commit_names_while_gc_takes_them_are_put_back(tmp_path: Path) -> None:
    """The committer finds them standing and looks again before gc deletes: then gc looks at the commits."""
    place, twin = filled(tmp_path / "s"), filled(tmp_path / "twin")
    more = [plan(where, n=4, first=60) for where in (place, twin)]
    for where, each in zip((place, twin), more):
        write(where, each, 0)
    stored = commit(twin, [more[1].id]).moments
    assert stored is not None
    place.create(stored.key, twin.read(stored.key))
    os.utime(tmp_path / "s" / stored.key, (time.time() - 2 * DAY,) * 2)

    def commits() -> None:
        commit(place, [more[0].id])
        retire(place, "train", ["train/00001"])  # the newest version has other moments

    collect(Deleting(place.uri, commits, "moments/"), delete=True)
    assert Functaset.open(place, 2).moments().count == 24
    assert verify(place, deep=True).bad == []


def test_a_replacement_whose_rows_were_all_retired_meanwhile_is_no_entry(tmp_path: Path) -> None:
    place = filled(tmp_path / "s")
    entry, each = Functaset.open(place).commit.fragments[0], Functaset.open(place).fragments[0].plan
    keys = table_of(place, each, 0).keys
    repaired = plan_again(place, keys, each.id)
    retire(place, "train", keys)
    made = commit(place, [repaired.id], {entry.fragment: range(8)})
    assert made.retired_fragments == (repaired.id,)
    assert [each.fragment for each in made.fragments].count(repaired.id) == 0
    collect(place, erase_retired=True, delete=True)
    assert shown(place) == sorted(set(names(0, 20)) - set(keys))
    assert verify(place, deep=True).bad == []


def test_what_a_wholly_retired_shard_lost_hinders_neither_repair_nor_erasure(tmp_path: Path) -> None:
    place = filled(tmp_path / "s")
    entry, each = Functaset.open(place).commit.fragments[0], Functaset.open(place).fragments[0].plan
    retire(place, "train", table_of(place, each, 1).keys)
    place.delete(f"{each.path}/receipts/000001.0.json")
    place.delete(f"{each.path}/rows/000001.json")
    kept = shown(place)
    repaired = plan_again(place, table_of(place, each, 0).keys, each.id)
    commit(place, [repaired.id], {entry.fragment: range(8)})
    assert shown(place) == kept
    collect(place, erase_retired=True, delete=True)
    assert shown(place) == kept
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
    place, twin = filled(tmp_path / "s"), filled(tmp_path / "twin")
    more = [plan(where, n=4, first=60) for where in (place, twin)]
    for where, each in zip((place, twin), more):
        write(where, each, 0)
    stored = commit(twin, [more[1].id]).moments
    assert stored is not None
    place.create(stored.key, twin.read(stored.key))  # left by a committer that was killed
    os.utime(tmp_path / "s" / stored.key, (time.time() - 2 * DAY,) * 2)
    taken: list[str] = []
    rival = Overtaken(place.uri, lambda: taken.extend(collect(place, delete=True).removed), "commits/")
    commit(rival, [more[0].id])
    assert taken == [stored.key]
    assert verify(place, deep=True).bad == []
    assert Functaset.open(place).moments().count == 24


@pytest.mark.faults
@pytest.mark.slow
def test_a_writer_killed_at_many_points_leaves_nothing_that_the_next_one_trusts_wrongly(tmp_path: Path) -> None:
    """Each time, the next writer ends with the bytes of an uninterrupted run. Every point: ... killed store DIR 1."""
    command = [sys.executable, "-m", "tests.helpers.storage.killed_writer", "store", str(tmp_path), "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) >= 30


@pytest.mark.slow
@pytest.mark.faults
def test_four_writers_of_one_fragment_killed_again_and_again_end_with_an_uninterrupted_runs_bytes(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-m", "tests.helpers.storage.crowd", str(tmp_path), "50", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) >= 50


@dataclass(frozen=True)
class Sleeper(LocalLocation):
    """Sleeps before its first object is put, while another writes the whole shard."""

    wake: Callable[[], None] = lambda: None
    slept: list[bool] = field(default_factory=list)

    def create(self, key: str, data: bytes) -> bool:
        if "/c/" in key and not self.slept:
            self.slept.append(True)
            self.wake()
        return super().create(key, data)


def test_a_late_writer_that_wakes_after_its_shard_was_done_by_another_changes_no_byte(tmp_path: Path) -> None:
    place = new_store(tmp_path / "s")
    each = plan(place)
    done: list[Any] = []

    def another() -> None:
        done.append(write(place, each, 1))
        done.append(tree(tmp_path / "s"))

    shifted = latents_of(table_of(place, each, 1).keys) + np.float32(0.1)
    receipt = write(Sleeper(place.uri, another), each, 1, latents=shifted)
    assert receipt == done[0]
    assert tree(tmp_path / "s") == done[1]
