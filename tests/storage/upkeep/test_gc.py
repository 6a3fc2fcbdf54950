"""Retiring, giving up, erasing: what goes is what must go, and nothing else."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from functa.storage.errors import StorageError
from functa.storage.functaset import history
from functa.storage.functaset.commit import commit, retire
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.history import as_ranges, as_rows, latest
from functa.storage.functaset.plan import row_id
from functa.storage.places.local import LocalLocation
from functa.storage.places.location import Location
from functa.storage.upkeep.gc import DAY, collect
from functa.storage.upkeep.verify import verify
from tests.helpers.storage.functasets import fill, filled, latents_of, new_store, plan, table_of, tree, write


def later() -> float:
    return time.time() + 2 * DAY


def shown(place: Location, split: str = "train", version: int | None = None) -> list[str]:
    return sorted(Functaset.open(place, version).load(split).keys)


def names(first: int, n: int, split: str = "train") -> list[str]:
    return [f"{split}/{i:05d}" for i in range(first, first + n)]


def test_ranges_and_rows_are_inverses() -> None:
    for rows in ([], [0], [3, 1, 2], [0, 2, 3, 4, 9]):
        assert as_rows(as_ranges(rows)) == sorted(rows)
    assert as_ranges([5, 1, 2, 3, 3]) == ((1, 4), (5, 6))


@pytest.mark.parametrize("bits", [8, 32])
def test_retired_rows_are_shown_by_older_versions_only_and_the_moments_are_those_of_the_rest(
    tmp_path: Path, bits: int
) -> None:
    place = filled(tmp_path / "s", bits)
    before = tree(tmp_path / "s")
    made = retire(place, "train", ["train/00003", "train/00011"])
    assert before.items() <= tree(tmp_path / "s").items()
    left = [key for key in names(0, 20) if key not in ("train/00003", "train/00011")]
    assert shown(place) == left
    assert shown(place, version=1) == names(0, 20)
    assert made.version == 2
    assert retire(place, "train", []) == made
    store = Functaset.open(place)
    assert (store.rows("train"), store.info()["retired"]) == (18, 2)
    z = store.load("train").dequantized().astype(np.float64)
    np.testing.assert_allclose(store.moments().mean, z.mean(0), atol=1e-12)
    assert store.moments().count == 18
    assert verify(place, deep=True).bad == []
    assert retire(place, "train", ["train/00003"]) == made
    with pytest.raises(StorageError, match=r"shows no image 'train/99999' in split 'train'; .* lists the keys"):
        retire(place, "train", ["train/99999"])


def test_a_changed_image_is_new_rows_and_the_retirement_of_the_old_ones_in_one_commit(tmp_path: Path) -> None:
    place = filled(tmp_path / "s")
    content = Functaset.open(place).content
    entry = Functaset.open(place).commit.fragments[0]
    again = plan(place, n=1, first=4, shard_rows=4)
    write(place, again, 0)
    with pytest.raises(StorageError, match="visible already"):
        commit(place, [again.id])
    store = Functaset.open(place)
    keys = [key for shard in range(3) for key in table_of(place, store.fragments[0].plan, shard).keys]
    made = commit(place, [again.id], {entry.fragment: [keys.index("train/00004")]})
    assert made.version == 2
    assert shown(place) == names(0, 20)
    assert Functaset.open(place).content == content  # the same images, in other shards


def test_of_a_shard_whose_rows_are_all_retired_nothing_is_read_any_more(tmp_path: Path) -> None:
    place = filled(tmp_path / "s")
    store = Functaset.open(place)
    entry, each = store.commit.fragments[0], store.fragments[0].plan
    commit(place, [], {entry.fragment: range(8, 16)})
    for path in (tmp_path / "s" / each.path).rglob("*"):
        if path.is_file() and ("c/1" in str(path) or "000001" in path.name):
            path.unlink()
    assert verify(place, deep=True).bad == []
    expected = sorted([*table_of(place, each, 0).keys, *table_of(place, each, 2).keys])
    assert shown(place) == expected
    assert len(Functaset.open(place).content) == 24
    commit(place, [], {entry.fragment: range(20)})
    assert [e.split for e in Functaset.open(place).commit.fragments] == ["test"]
    with pytest.raises(StorageError, match="no rows of split 'train'"):
        Functaset.open(place).load("train")


def test_erasing_forgets_the_names_too_even_where_no_row_of_them_is_left(tmp_path: Path) -> None:
    place = filled(tmp_path / "s")
    retire(place, "train", names(0, 20))
    collect(place, keep_versions=1, delete=True)
    assert len(Functaset.open(place).commit.retired_images) == 20
    collect(place, erase_retired=True, delete=True)
    left = b"".join(path.read_bytes() for path in (tmp_path / "s").rglob("*") if path.is_file())
    assert not any(row_id(key).hex().encode() in left for key in names(0, 20))
    assert verify(place, deep=True).bad == []
    assert collect(place, erase_retired=True, delete=True).removed == []


def test_a_fragment_that_was_shown_and_is_no_more_does_not_come_back(tmp_path: Path) -> None:
    place = filled(tmp_path / "s")
    entry = Functaset.open(place).commit.fragments[0]
    retire(place, "train", names(0, 20))
    assert commit(place, [entry.fragment]).version == 2
    collect(place, erase_retired=True, delete=True)
    made = commit(place, [entry.fragment])
    assert ([each.split for each in made.fragments], made.retired_fragments) == (["test"], (entry.fragment,))
    assert place.list(f"fragments/{entry.fragment}/") == [f"fragments/{entry.fragment}/claim"]


@pytest.mark.attacks
def test_gc_removes_what_was_abandoned_and_only_that(tmp_path: Path) -> None:
    place = filled(tmp_path / "s")
    kept = tree(tmp_path / "s")
    abandoned = plan(place, n=9, first=100)
    write(place, abandoned, 0)
    (tmp_path / "s" / "notes.txt").write_text("mine")
    (tmp_path / "s" / abandoned.path / "readme").write_text("mine too")
    (tmp_path / "s" / "moments" / f"{'0' * 24}.f8").write_bytes(b"orphan")
    left = tmp_path / "s" / f".zarr.json.{'a' * 32}.partial"
    left.write_bytes(b"12")
    assert collect(place).removed == []  # all of it is young: somebody may be at work
    would = collect(place, now=later)
    assert would.fragments == [abandoned.id]
    assert left.exists()
    assert (tmp_path / "s" / abandoned.path / "plan.json").exists()
    done = collect(place, now=later, delete=True)
    assert sorted(done.removed) == sorted(would.removed)
    assert done.unknown == [f"{abandoned.path}/readme", "notes.txt"]
    after = tree(tmp_path / "s")
    assert after.keys() == kept.keys() | {*done.unknown, f"{abandoned.path}/claim"}
    assert kept.items() <= after.items()
    assert not left.exists()
    assert collect(place, now=later, delete=True).removed == []
    assert verify(place, deep=True).bad == []


def test_expired_versions_are_collected_with_the_objects_that_only_they_named(tmp_path: Path) -> None:
    place = filled(tmp_path / "s")
    first = Functaset.open(place).commit.fragments[0].fragment
    fill(place, [plan(place, n=5, first=20)])
    commit(place, [], {first: range(20)})
    assert collect(place, keep_versions=2).versions == [1, 2]
    done = collect(place, keep_versions=2, delete=True)
    assert done.versions == [1, 2]
    assert done.fragments == [first]
    assert [v for v in range(1, 5) if place.read(f"commits/{v:08d}.json") != b"given up\n"] == [3, 4]
    assert shown(place) == shown(place, version=3) == names(20, 5)
    with pytest.raises(StorageError, match=r"version 1 has expired; versions: 3, 4$"):
        Functaset.open(place, 1)
    assert verify(place, deep=True).bad == []
    assert collect(place, keep_versions=2, delete=True).removed == []
    assert latest(place).version == 4  # type: ignore[union-attr]


@pytest.mark.parametrize("bits", [8, 32])
def test_an_erased_image_leaves_no_byte_behind_and_the_others_are_as_they_were(tmp_path: Path, bits: int) -> None:
    place = new_store(tmp_path / "s", {"bits": bits})
    each = plan(place, bits=bits)
    for shard in range(each.shards):
        write(place, each, shard, bad={1: "does not decode"} if shard == 1 else {})
    commit(place, [each.id])
    whole = Functaset.open(place).load("train")
    unwanted = [key for key in whole.keys if key in ("train/00002", "train/00013")]
    made = retire(place, "train", unwanted)
    content = Functaset.open(place).content
    would = collect(place, erase_retired=True)
    assert would.rewritten == [each.id]
    assert latest(place) == made
    done = collect(place, erase_retired=True, delete=True)
    assert done.fragments == [each.id]
    # The new commit's moments are merged over other shards: their last bits, and so their name, may be others.
    assert {key for key in done.removed if key[:8] != "moments/"} == {k for k in would.removed if k[:8] != "moments/"}
    after = Functaset.open(place).load("train")
    stay = [row for row, key in enumerate(whole.keys) if key not in unwanted]
    assert after.keys == [whole.keys[row] for row in stay]
    np.testing.assert_array_equal(after.dequantized(), whole.dequantized()[stay])
    for name in ("labels", "ids", "psnr"):
        np.testing.assert_array_equal(getattr(after, name), getattr(whole, name)[stay])
    assert Functaset.open(place).content == content
    assert Functaset.open(place).info()["bad"] == 1
    everything = b"".join(path.read_bytes() for path in (tmp_path / "s").rglob("*") if path.is_file())
    for key in unwanted:
        assert key.encode() not in everything
        assert row_id(key) not in everything
        assert latents_of([key]).tobytes() not in everything
    assert verify(place, deep=True).bad == []
    assert collect(place, erase_retired=True, delete=True).removed == []


class Stopped(BaseException):
    """Acts as a SIGKILL: no code catches it."""


@dataclass(frozen=True)
class Stopping(LocalLocation):
    """Stops for ever at the k-th deletion or replacement."""

    left: list[int] = field(default_factory=list)

    def delete(self, key: str) -> None:
        self._count()
        super().delete(key)

    def write(self, key: str, data: bytes) -> None:
        self._count()
        super().write(key, data)

    def _count(self) -> None:
        self.left[0] -= 1
        if self.left[0] < 0:
            raise Stopped


@pytest.mark.parametrize("deletions", [0, 1, 5, 20, 27, 29])
def test_erasing_that_was_interrupted_anywhere_goes_on(tmp_path: Path, deletions: int) -> None:
    place = filled(tmp_path / "s")
    retire(place, "train", ["train/00002"])
    with pytest.raises(Stopped):
        collect(Stopping(place.uri, [deletions]), erase_retired=True, delete=True)
    assert shown(place) == [key for key in names(0, 20) if key != "train/00002"]
    collect(place, erase_retired=True, delete=True)
    assert shown(place) == [key for key in names(0, 20) if key != "train/00002"]
    left = b"".join(path.read_bytes() for path in (tmp_path / "s").rglob("*") if path.is_file())
    assert b"train/00002" not in left
    assert verify(place, deep=True).bad == []


def test_a_missing_or_forged_newest_commit_is_reported(tmp_path: Path) -> None:
    place = filled(tmp_path / "s")
    fill(place, [plan(place, n=5, first=20)])
    newest = tmp_path / "s" / "commits" / "00000002.json"
    data = newest.read_bytes()
    newest.unlink()
    with pytest.raises(StorageError, match=r"commits/00000002\.json: is missing; restore it"):
        Functaset.open(place)
    assert [bad["path"] for bad in verify(place).bad] == ["commits/00000002.json"]
    newest.write_bytes((tmp_path / "s" / "commits" / "00000001.json").read_bytes())
    with pytest.raises(StorageError, match="is version 1; it was renamed"):
        Functaset.open(place)
    newest.write_bytes(data)
    assert len(shown(place)) == 25


def test_giving_versions_up_may_be_interrupted_anywhere(tmp_path: Path) -> None:
    """At no instant does a mark belong to a missing commit, or is a version missing that has not expired."""
    done, stops = False, 0
    while not done:
        folder = tmp_path / str(stops)
        place = filled(folder)
        retire(place, "train", ["train/00002"])
        commit(place, [], keep_versions=1)
        try:
            collect(Stopping(place.uri, [stops]), delete=True)
            done = True
        except Stopped:
            stops += 1
        assert verify(place, deep=True).bad == []
        assert Functaset.open(place).version == 3
        collect(place, delete=True)
        for version in (1, 2):
            with pytest.raises(StorageError, match=f"version {version} has expired; versions: 3$"):
                Functaset.open(place, version)
    assert stops >= 4


def test_a_functaset_without_visible_rows_reports_it(tmp_path: Path) -> None:
    place = filled(tmp_path / "s")
    for split, n in (("train", 20), ("test", 6)):
        retire(place, split, names(0, n, split))
    store = Functaset.open(place)
    assert store.info()["rows"] == 0
    with pytest.raises(StorageError, match="version 3 shows no rows"):
        store.latent_shape


def test_fragments_of_an_encoding_that_never_committed_are_collected(tmp_path: Path) -> None:
    place = new_store(tmp_path / "s")
    begun = plan(place, n=6)
    for shard in range(begun.shards):
        write(place, begun, shard)
    collect(place, delete=True, now=later)
    assert not [key for key in place.list("fragments/") if key.endswith("plan.json")]


def test_lists_of_entries_are_collected_with_the_last_version_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "LIST_ENTRIES", 2)
    place = filled(tmp_path / "s")
    for first in (20, 25, 30):
        fill(place, [plan(place, n=5, first=first)])
    before = set(place.list("lists/"))
    assert len(before) == 2  # of all versions, and of the last two
    made = commit(place, [], {Functaset.open(place).fragments[0].id: [0]})
    kept = {named.key for named in made.lists}
    (unneeded,) = before - kept
    assert len(kept) == 2
    assert collect(place, delete=True, older_than=0).removed == []
    assert unneeded in collect(place, delete=True, keep_versions=1).removed
    assert set(place.list("lists/")) == kept
    assert len(Functaset.open(place).commit.fragments) == 5
    assert verify(place, deep=True).bad == []
