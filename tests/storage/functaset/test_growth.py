"""Growth of requests and bytes with shards and commits, counted in memory with shards that hold nothing."""

import json
from pathlib import Path

import numpy as np
import pytest

from functa.storage.functaset.commit import commit, retire
from functa.storage.functaset.fragment import Fragment
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.header import create_functaset
from functa.storage.functaset.history import LIST_ENTRIES, commit_key, latest, load_commit
from functa.storage.functaset.plan import TABLES, RowTable
from functa.storage.functaset.planning import plan_fragment
from functa.storage.functaset.receipts.manifest import MANY_SHARDS, blocks_key
from functa.storage.functaset.receipts.moments import merge
from functa.storage.functaset.records import seal
from functa.storage.readers.shards import SplitShards
from functa.storage.upkeep.verify import verify
from tests.helpers.storage.functasets import FIELD, FINGERPRINT
from tests.helpers.storage.memory_location import MemoryLocation, finish_cheaply, finish_shard_cheaply

SHAPE = (1, 1, 4)


@pytest.fixture
def place() -> MemoryLocation:
    location = MemoryLocation("memory")
    create_functaset(location, FINGERPRINT, FIELD, {"width": 3}, "f0")
    return location


def planned(place: MemoryLocation, first: int, count: int, shard_rows: int, split: str = "train") -> Fragment:
    keys = [f"{split}/{row:07d}" for row in range(first, first + count)]
    rows = RowTable.of(keys, np.zeros(count, np.int32), ["t"] * count)
    return plan_fragment(
        place, rows, split=split, latent_shape=SHAPE, shard_rows=shard_rows, chunk_rows=shard_rows, quantizer=None
    )


def added(place: MemoryLocation, first: int, count: int, shard_rows: int) -> int:
    """Commit new images; return how many reads the commit took."""
    fragment = planned(place, first, count, shard_rows)
    finish_cheaply(fragment)
    before = place.counts["read"]
    commit(place, [fragment.id])
    return place.reads_since(before)


@pytest.mark.parametrize(("shards", "rows"), [(50, 800), pytest.param(5000, 8, marks=pytest.mark.slow)])
def test_one_image_more_costs_as_many_requests_whatever_the_shards(
    shards: int, rows: int, place: MemoryLocation
) -> None:
    first = added(place, 0, rows * shards, rows)
    assert first <= 4.1 * shards + 40  # receipt, table and moments of each, and a listing
    assert added(place, rows * shards, 1, rows) <= 40
    before = place.counts["read"]
    store = Functaset.open(place)
    assert SplitShards(store, "train").rows == rows * shards + 1
    assert store.info()["rows"] == rows * shards + 1
    assert place.reads_since(before) <= 20


@pytest.mark.parametrize("shards", [200, pytest.param(5000, marks=pytest.mark.slow)])
def test_a_retired_image_costs_the_reads_of_a_block_and_the_moments_are_those_of_what_is_left(
    shards: int, place: MemoryLocation
) -> None:
    fragment = planned(place, 0, shards, 1)
    finish_cheaply(fragment)
    made = commit(place, [fragment.id])
    whole = merge((shard.moments() for shard in fragment.shards), SHAPE)
    assert place.objects[made.moments.key] == whole.to_bytes()  # to the last bit
    key = fragment.shards[3].table().keys[0]
    before = place.counts["read"]
    retire(place, "train", [key])
    assert place.reads_since(before) <= 110
    left = merge((shard.moments() for shard in fragment.shards if shard.number != 3), SHAPE)
    store = Functaset.open(place)
    assert store.rows("train") == shards - 1
    moments = store.moments()
    assert moments.count == shards - 1
    np.testing.assert_allclose(moments.mean, left.mean, rtol=1e-12)
    np.testing.assert_allclose(moments.var, left.var, rtol=1e-12)


def test_moments_by_blocks_leave_bad_rows_out(place: MemoryLocation) -> None:
    fragment = planned(place, 0, 400, 2)
    for shard in fragment.shards:
        finish_shard_cheaply(shard, {1: "not finite"} if shard.number == 150 else {})
    assert commit(place, [fragment.id]).moments.count == 399
    retire(place, "train", fragment.shards[3].table().keys)
    moments = Functaset.open(place).moments()
    left = merge((shard.moments() for shard in fragment.shards if shard.number != 3), SHAPE)
    assert moments.count == left.count == 397
    np.testing.assert_allclose(moments.var, left.var, rtol=1e-12)


def test_only_training_fragments_of_many_shards_keep_moments_by_blocks(place: MemoryLocation) -> None:
    many = [("train", MANY_SHARDS, False), ("test", MANY_SHARDS + 1, False), ("train", MANY_SHARDS + 1, True)]
    for split, shards, kept in many:
        fragment = planned(place, 1000 * shards, shards, 1, split)
        finish_cheaply(fragment)
        commit(place, [fragment.id])
        assert (blocks_key(fragment.id) in place.objects) == kept


@pytest.mark.parametrize("commits", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_the_history_of_small_additions_is_linear(commits: int, place: MemoryLocation) -> None:
    added(place, 0, 40, 2)
    reads, sizes = [], []
    for number in range(commits):
        reads.append(added(place, 40 + number, 1, 2))
        sizes.append(len(place.objects[commit_key(number + 2)]))
    lists = sum(len(data) for key, data in place.objects.items() if key.startswith("lists/"))
    print(json.dumps({"commits": commits, "reads": reads[-1], "bytes": sum(sizes) + lists}))
    assert max(sizes) < 2.2 * max(sizes[:LIST_ENTRIES])
    assert reads[-1] <= 45 + commits // 16
    newest = latest(place)
    assert newest is not None
    assert len(newest.fragments) == commits + 1
    assert load_commit(place, 2).fragments == newest.fragments[:2]
    shown = verify(place)
    assert shown.bad == []


@pytest.mark.parametrize("shards", [1001, pytest.param(600_000, marks=pytest.mark.slow)])
def test_a_plan_of_many_shards_is_short_and_read_back(shards: int, place: MemoryLocation) -> None:
    fragment = planned(place, 0, shards, 1)
    plan = place.objects[f"{fragment.plan.path}/plan.json"]
    assert len(plan) < 4096
    read = Fragment.load(place, fragment.id)
    assert read.plan == fragment.plan
    assert read.plan.format == 2
    assert TABLES in read.plan.objects
    assert len(read.shards) == shards
    assert len(read.shards[shards - 1].table()) == 1
    assert sum(key.startswith(f"{fragment.plan.path}/rows/") for key in place.objects) == shards + 1


def test_a_manifest_holds_every_receipt_to_the_byte(place: MemoryLocation) -> None:
    fragment = planned(place, 0, 40, 4)
    finish_cheaply(fragment, bad={1: "is empty", 3: "diverged"})
    commit(place, [fragment.id])
    (shown,) = Functaset.open(place).fragments
    for shard in shown.shards:
        assert seal(shard.receipt) == place.objects[shard.receipt_key]
        assert shard.receipt == shard.stored_receipt
        assert shard.bad.tolist() == [1, 3]


def test_names_of_eight_digits_and_more_are_known_to_all(tmp_path: Path) -> None:
    from functa.storage.upkeep.gc import FRAGMENT
    from functa.tasks.encoding.repair import OF_SHARD

    path = f"fragments/{'0' * 24}"
    for key in ("rows/1234567.json", "receipts/1234567.0.json", "moments/12345678.f8", "z/c/1234567/0/0/0"):
        assert FRAGMENT.fullmatch(f"{path}/{key}"), key
        match = OF_SHARD.match(f"{path}/{key}")
        assert match and int(match[2] or match[3]) in (1234567, 12345678), key
