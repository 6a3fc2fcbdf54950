"""Compaction: many small fragments become one, and no row changes, whenever it is interrupted."""

from pathlib import Path

import numpy as np
import pytest

from functa.storage.errors import StorageError
from functa.storage.functaset.commit import commit, retire
from functa.storage.functaset.fragment import Fragment
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.history import latest
from functa.storage.functaset.plan import RowTable
from functa.storage.functaset.planning import plan_fragment
from functa.storage.places.location import Location
from functa.storage.upkeep import compact as compaction
from functa.storage.upkeep.compact import compact
from functa.storage.upkeep.gc import collect
from functa.storage.upkeep.verify import verify
from tests.helpers.storage.functasets import SHAPE, filled, new_store, plan, tree, write
from tests.helpers.storage.mortal import Killed, Mortal

Rows = dict[str, tuple[int, bytes, float, bytes]]


def grown(folder: Path, bits: int) -> Location:
    """A functaset of four additions to a split; one image is bad, two are retired."""
    place = filled(folder, bits)
    for first, bad in ((20, {1: "is empty"}), (25, {}), (30, {})):
        each = plan(place, n=5, first=first, bits=bits)
        for shard in range(each.shards):
            write(place, each, shard, bad=bad)
        commit(place, [each.id])
    retire(place, "train", ["train/00003", "train/00026"])
    return place


def rows_of(place: Location) -> Rows:
    rows: Rows = {}
    for split in ("train", "test"):
        loaded = Functaset.open(place).load(split)
        z = loaded.z if loaded.codes is None else loaded.codes
        assert z is not None
        digests = np.concatenate([shard.array("source_sha256")[shard.rows] for shard in loaded.shards])
        for key, label, row, psnr, sha256 in zip(loaded.keys, loaded.labels, z, loaded.psnr, digests, strict=True):
            rows[key] = int(label), row.tobytes(), float(psnr), sha256.tobytes()
    return rows


@pytest.mark.parametrize("bits", [8, 32])
def test_many_small_fragments_become_one_with_the_same_bytes_of_every_row(tmp_path: Path, bits: int) -> None:
    place = grown(tmp_path / "s", bits)
    before, opened = rows_of(place), Functaset.open(place)
    done = compact(place)
    after = Functaset.open(place)
    assert [entry.split for entry in after.commit.fragments] == ["test", "train"]
    assert (len(done.merged), done.made) == (4, (after.commit.fragments[1].fragment,))
    assert rows_of(place) == before
    assert after.content == opened.content
    assert after.bad_inputs() == opened.bad_inputs()
    np.testing.assert_allclose(after.moments().mean, opened.moments().mean, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(after.moments().var, opened.moments().var, rtol=1e-12)
    assert verify(place, deep=True).bad == []
    assert compact(place).made == ()
    assert latest(place) == after.commit
    assert len(rows_of_version(place, opened.version)) == len(before)  # older versions stay until they expire
    collected = collect(place, delete=True, keep_versions=1)
    assert set(done.merged) <= set(collected.fragments)
    assert rows_of(place) == before
    assert verify(place, deep=True).bad == []


def rows_of_version(place: Location, version: int) -> list[str]:
    store = Functaset.open(place, version)
    return [key for split in store.splits for key in store.load(split).keys]


@pytest.mark.faults
@pytest.mark.parametrize("step", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_compaction_killed_at_any_change_ends_with_the_same_bytes(tmp_path: Path, step: int) -> None:
    place = grown(tmp_path / "s", 8)
    rows, version = rows_of(place), Functaset.open(place).version
    killed = 0
    for changes in range(0, 10_000, 7 if step else 1):
        try:
            compact(Mortal(place.uri, [changes]))
        except Killed:
            killed += 1
            assert rows_of(place) == rows
            assert verify(place).bad == []
            continue
        break
    assert killed >= (3 if step else 15)
    assert rows_of(place) == rows
    assert Functaset.open(place).version == version + 1
    undisturbed = grown(tmp_path / "undisturbed", 8)
    compact(undisturbed)
    assert tree(place.uri) == tree(undisturbed.uri)


def test_rows_that_are_retired_during_a_compaction_stay_retired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = grown(tmp_path / "s", 8)
    rewrite = compaction.rewrite

    def retiring(*arguments: object) -> object:
        made = rewrite(*arguments)  # type: ignore[arg-type]
        retire(place, "train", ["train/00007", "train/00033"])
        return made

    monkeypatch.setattr(compaction, "rewrite", retiring)
    before = set(rows_of(place))
    compact(place)
    assert set(rows_of(place)) == before - {"train/00007", "train/00033"}


def test_a_fragment_that_somebody_else_replaced_meanwhile_is_not_shown_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = grown(tmp_path / "s", 8)
    rewrite = compaction.rewrite

    def overtaken(*arguments: object) -> object:
        made = rewrite(*arguments)  # type: ignore[arg-type]
        monkeypatch.setattr(compaction, "rewrite", rewrite)
        collect(place, delete=True, erase_retired=True)
        return made

    monkeypatch.setattr(compaction, "rewrite", overtaken)
    before = rows_of(place)
    with pytest.raises(StorageError, match="that it replaces is no longer shown; run the same command again"):
        compact(place)
    assert rows_of(place) == before
    compact(place)
    assert rows_of(place) == before


def test_a_large_fragment_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "SMALL", 2)
    monkeypatch.setattr(compaction, "SHARD_ROWS", 8)
    place = grown(tmp_path / "s", 8)
    large = next(entry.fragment for entry in Functaset.open(place).commit.fragments if entry.rows > 15)
    done = compact(place)
    assert large not in done.merged
    assert len(done.merged) == 3


def test_a_functaset_without_a_commit_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nothing is committed yet; finish encoding first"):
        compact(new_store(tmp_path / "s"))


@pytest.mark.faults
def test_rows_to_retire_are_found_where_a_compaction_has_moved_them(tmp_path: Path) -> None:
    """An encoding plans which rows to retire; before it commits, others compact, once or again, and retire too."""
    place = grown(tmp_path / "s", 8)
    before = rows_of(place)
    entry = next(each for each in Functaset.open(place).commit.fragments if each.split == "train" and each.rows > 15)
    rows = {key: row for row, key, _ in Fragment.committed(place, entry).visible_keys()}
    compact(place)
    more = plan(place, n=5, first=40)
    write(place, more, 0)
    commit(place, [more.id])
    compact(place)
    new = plan(place, n=1, first=7, bits=8, range="sigma")  # a changed image replaces one of the two
    write(place, new, 0)
    lost = {entry.fragment: [row for key, row in rows.items() if key in ("train/00004", "train/00007")]}
    commit(place, [new.id], lost)
    assert set(rows_of(place)) == (set(before) | {f"train/{number:05d}" for number in range(40, 45)}) - {"train/00004"}
    compact(place)
    done, after = latest(place), rows_of(place)
    assert commit(place, [new.id], lost) == done  # the same commit once more
    assert rows_of(place) == after


def test_a_row_that_was_encoded_anew_meanwhile_is_not_retired(tmp_path: Path) -> None:
    place = filled(tmp_path / "s")
    (entry,) = (each for each in Functaset.open(place).commit.fragments if each.split == "train")
    table = Fragment.committed(place, entry).shards[0].table()
    fresh = RowTable.of(table.keys, table.labels, [f"{token}-changed" for token in table.tokens])
    options = {"latent_shape": SHAPE, "shard_rows": 8, "chunk_rows": 4, "quantizer": None, "codec": "zstd"}
    again = plan_fragment(place, fresh, split="train", **options).plan  # type: ignore[arg-type]
    write(place, again, 0)
    commit(place, [again.id], retire_fragments=[entry.fragment])
    before = latest(place)
    assert commit(place, [], {entry.fragment: range(8)}) == before


@pytest.mark.faults
def test_rows_to_retire_whose_fragment_was_collected_are_an_error_to_repeat(tmp_path: Path) -> None:
    place = grown(tmp_path / "s", 8)
    entry = next(each for each in Functaset.open(place).commit.fragments if each.split == "train" and each.rows > 15)
    compact(place)
    collect(place, delete=True, keep_versions=1)
    with pytest.raises(StorageError, match=r"was merged and collected since .* run the same command again"):
        commit(place, [], {entry.fragment: [4]})
    retire(place, "train", ["train/00004"])
    assert "train/00004" not in rows_of(place)
