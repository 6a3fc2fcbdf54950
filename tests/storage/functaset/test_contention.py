"""Several commit at once, or retire what another replaces: every image is shown once, and what is retired stays so."""

import threading
from pathlib import Path

import numpy as np
import pytest

from functa.storage.errors import StorageError
from functa.storage.functaset.commit import commit, retire
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.history import latest
from functa.storage.functaset.plan import Plan, RowTable
from functa.storage.functaset.planning import plan_fragment
from functa.storage.places.location import Location
from functa.storage.upkeep.gc import collect
from functa.storage.upkeep.verify import verify
from tests.helpers.storage.functasets import filled, new_store, plan, table_of, write
from tests.helpers.storage.locations import Home
from tests.helpers.storage.overtaken import Overtaken
from tests.storage.upkeep.test_gc import later, names, shown


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
