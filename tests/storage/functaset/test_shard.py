"""Shards as they are planned and written: sizes, masks, clipping, and what an earlier writer left."""

from pathlib import Path

import numpy as np
import pytest

from functa.storage.config import QuantizationConfig
from functa.storage.errors import StorageError
from functa.storage.functaset.commit import commit
from functa.storage.functaset.fragment import Fragment
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.plan import RowTable
from functa.storage.functaset.planning import plan_fragment
from functa.storage.functaset.quantizer import Quantizer, calibrate
from functa.storage.places.address import open_location
from functa.storage.upkeep.verify import verify
from tests.helpers.storage.functasets import (
    SHAPE,
    fill,
    latents_of,
    new_store,
    plan,
    shard_of,
    table_of,
    tree,
    write,
)
from tests.helpers.storage.locations import Home


@pytest.mark.parametrize("codec", ["zstd", "exact"])
@pytest.mark.parametrize("bits", [8, 7, 6, 5, 4])
def test_measured_bits_per_dimension_are_at_most_what_was_asked_for(tmp_path: Path, bits: int, codec: str) -> None:
    place = new_store(tmp_path / "s")
    keys = [str(i) for i in range(2000)]
    z = np.random.default_rng(0).normal(0, 0.05, (2000, 4, 4, 16)).astype(np.float32)
    each = plan_fragment(
        place, RowTable.of(keys, np.zeros(2000, np.int32), keys), split="train", latent_shape=(4, 4, 16),
        shard_rows=1024, chunk_rows=256, quantizer=calibrate(QuantizationConfig(bits=bits), z), codec=codec,
    ).plan  # fmt: skip
    for shard in range(each.shards):
        write(place, each, shard, latents=z[table_of(place, each, shard).rows])
    commit(place, [each.id])
    info = Functaset.open(place).info()
    assert info["bits"] == bits
    assert 0 < info["bits_per_dim"] <= bits + (0.05 if codec == "exact" else 0)


@pytest.mark.faults
def test_bad_and_diverged_rows_are_masked_and_named_and_shift_nothing(home: Home) -> None:
    place = new_store(home / "s")
    each = plan(place, n=8)
    rows = table_of(place, each, 0)
    z = latents_of(rows.keys)
    z[5, 0, 0, 0] = np.inf
    psnr = np.full(8, 30, np.float32)
    psnr[6] = np.nan
    receipt = write(place, each, 0, bad={2: "not an image"}, latents=z, psnr=psnr)
    assert receipt.bad == {2: "not an image", 5: "diverged", 6: "diverged"}
    assert receipt.psnr.count == 5
    commit(place, [each.id])
    train = Functaset.open(place).load("train")
    assert train.keys == [key for row, key in enumerate(rows.keys) if row not in (2, 5, 6)]
    np.testing.assert_array_equal(train.labels, [int(key[-5:]) % 10 for key in train.keys])
    assert np.abs(train.dequantized() - latents_of(train.keys)).max() < 0.01
    assert Functaset.open(place).info()["bad"] == 3


def test_a_shard_of_bad_rows_alone_is_no_obstacle(home: Home) -> None:
    place = new_store(home / "s")
    each = plan(place, n=2)
    write(place, each, 0, bad={0: "a", 1: "b"})
    commit(place, [each.id])
    store = Functaset.open(place)
    assert store.rows("train") == len(store.load("train")) == store.moments().count == 0
    assert store.info()["psnr"]["by_split"] == {"train": {}}


def test_a_shard_written_again_changes_no_byte(home: Home) -> None:
    place = new_store(home / "s")
    each = plan(place)
    receipt = write(place, each, 1)
    before = tree(home / "s")
    other = write(place, each, 1, latents=np.zeros((each.shard_size(1), *SHAPE), np.float32), seconds=9.0)
    assert other == receipt
    assert tree(home / "s") == before


def test_objects_of_a_writer_killed_before_its_receipt_are_adopted_if_they_differ_too(tmp_path: Path) -> None:
    """Another environment rounds otherwise: the receipt must describe what is stored, not what was just computed."""
    place = new_store(tmp_path / "s", {"bits": 32})
    each = plan(place, bits=32)
    rows = table_of(place, each, 0)
    write(place, each, 0, latents=latents_of(rows.keys) + np.float32(1e-3), bad={3: "unreadable then"})
    (tmp_path / "s" / each.path / "receipts" / "000000.0.json").unlink()
    before = tree(tmp_path / "s")
    receipt = write(place, each, 0)
    assert before.items() <= tree(tmp_path / "s").items()
    assert set(receipt.bad) == {3}
    for shard in (1, 2):
        write(place, each, shard)
    commit(place, [each.id])
    train = Functaset.open(place).load("train")
    shifted = train.dequantized()[:6] - latents_of(train.keys)[:6]
    np.testing.assert_allclose(shifted, 1e-3, atol=1e-6)
    assert verify(place, deep=True).bad == []


def test_two_planners_share_one_fragment_and_other_rows_make_another(home: Home) -> None:
    place = new_store(home / "s")
    first = plan(place)
    before = tree(home / "s")
    assert plan(place) == first
    assert tree(home / "s") == before
    ids = {first.id, plan(place, n=19).id, plan(place, bits=7).id, plan(place, "test").id, plan(place, shard_rows=4).id}
    assert len(ids) == 5


def test_shards_are_equally_long_and_rows_are_mixed(home: Home) -> None:
    each = plan(new_store(home / "s"), n=20)  # at most 8 rows in a shard
    assert [each.shard_size(shard) for shard in range(each.shards)] == [8, 8, 4]
    each = plan(open_location(str(home / "s")), n=21, shard_rows=16)
    assert [each.shard_size(shard) for shard in range(each.shards)] == [12, 9]
    rows = np.concatenate([table_of(open_location(str(home / "s")), each, s).rows for s in range(2)])
    assert sorted(rows) == list(range(21))
    assert list(rows) != list(range(21))


def test_a_misaligned_block_is_a_hard_error(home: Home) -> None:
    place = new_store(home / "s")
    each = plan(place)
    with pytest.raises(ValueError, match="not the whole of shard 0"):
        write(place, each, 0, latents=np.zeros((7, *SHAPE), np.float32))
    with pytest.raises(ValueError, match="shard 3 of 3"):
        write(place, each, 3)
    assert shard_of(place, each, 0).find_receipt() is None


@pytest.mark.faults
def test_clipping_is_counted_and_too_much_of_it_fails_the_shard_before_it_is_written(home: Home) -> None:
    place = new_store(home / "s")
    each = plan(place)
    z = latents_of(table_of(place, each, 0).keys)
    z[0, 0, 0, :7] = 50
    before = tree(home / "s")
    with pytest.raises(StorageError, match=r"2\.73% of the latent numbers of 8 rows lie outside"):
        write(place, each, 0, latents=z)
    assert tree(home / "s") == before
    assert write(place, each, 0, latents=z, max_clip_fraction=0.02).clipped == 7
    for shard in (1, 2):
        write(place, each, shard)
    commit(place, [each.id])
    assert Functaset.open(place).info()["clip_fraction"] == 7 / (20 * 32)


def test_rows_that_were_bad_may_be_committed_by_a_later_fragment(home: Home) -> None:
    place = new_store(home / "s")
    first = plan(place, n=4)
    bad = table_of(place, first, 0).keys.index("train/00003")
    write(place, first, 0, bad={bad: "was on a sick disk"})
    commit(place, [first.id])
    fill(place, [plan(place, n=1, first=3)])
    assert sorted(Functaset.open(place).load("train").keys) == [f"train/{i:05d}" for i in range(4)]


def test_a_quantiser_that_does_not_fit_and_keys_that_repeat_are_refused(home: Home) -> None:
    place = new_store(home / "s")
    flat = np.ones(8, np.float32)
    with pytest.raises(StorageError, match="do not fit latents"):
        plan(place, quantizer=Quantizer(8, flat, flat))
    for keys in ([], ["a", "a"]):
        with pytest.raises(StorageError, match="unique keys"):
            plan_fragment(
                place, RowTable.of(keys, np.zeros(len(keys)), keys), split="train", latent_shape=SHAPE,
                shard_rows=8, chunk_rows=4, quantizer=None,
            )  # fmt: skip
    with pytest.raises(StorageError, match="is missing"):
        Fragment.load(place, "0" * 24)
