import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from functa.storage.config import QuantizationConfig
from functa.storage.errors import StorageError
from functa.storage.functaset.commit import commit
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.header import create_functaset
from functa.storage.functaset.history import latest, load_commit
from functa.storage.functaset.quantizer import calibrate
from functa.storage.places.address import open_location
from functa.storage.places.reused import NotReused, allow_reuse
from functa.storage.readers.open import open_reader
from functa.storage.readers.order import Order
from functa.storage.readers.reader import epoch_order
from functa.storage.upkeep.status import status
from tests.helpers.storage.functasets import (
    FIELD,
    FINGERPRINT,
    SHAPE,
    fill,
    filled,
    latents_of,
    new_store,
    plan,
    tree,
    write,
)
from tests.helpers.storage.locations import Home


def test_a_root_opens_as_its_functaset_also_where_that_is_another_root_s(home: Home) -> None:
    theirs = filled(home / "theirs/functaset.zarr")
    for name, output in (("theirs", "functaset.zarr"), ("ours", theirs.uri)):
        root = open_location(str(home / name))
        root.write("stages/encode.json", json.dumps({"output": output}).encode())
        if output == theirs.uri:
            with pytest.raises(NotReused):
                Functaset.open(root)
            allow_reuse(root, output)
        functaset = Functaset.open(root)
        assert functaset.location == theirs
        assert functaset.rows("train") == 20


def test_a_splits_latents_and_a_batch_print_as_one_line_and_a_missing_split_names_those_there(home: Home) -> None:
    functaset = Functaset.open(filled(home / "coded"))
    assert repr(functaset.load("train")) == "Latents(20 rows of 2x2x8, uint8 codes)"
    plain = Functaset.open(filled(home / "plain", bits=32))
    assert repr(plain.load("test")) == "Latents(6 rows of 2x2x8, float32)"
    (batch, *_) = open_reader(plain, "test").batches(Order(4, seed=0), epoch=0)
    assert repr(batch) == "Batch(4 rows of 2x2x8, float32)"
    with pytest.raises(StorageError, match="no rows of split 'val'; it has train and test"):
        functaset.load("val")


def test_what_was_written_is_read_whatever_the_order_of_the_shards(home: Home) -> None:
    place = new_store(home / "s", {"bits": 32})
    plans = [plan(place, bits=32), plan(place, "test", n=6, bits=32)]
    for each in plans:
        for shard in reversed(range(each.shards)):
            write(place, each, shard)
    commit(place, [each.id for each in plans])
    store = Functaset.open(place)
    assert store.rows("train") == 20
    assert store.latent_shape == SHAPE
    train = store.load("train")
    assert sorted(train.keys) == [f"train/{i:05d}" for i in range(20)]
    np.testing.assert_array_equal(train.dequantized(), latents_of(train.keys))
    np.testing.assert_array_equal(train.labels, [int(key[-5:]) % 10 for key in train.keys])
    np.testing.assert_array_equal(train.source_rows, [int(key[-5:]) for key in train.keys])
    assert train.ids.shape == (20, 16)
    assert len({bytes(row) for row in train.ids}) == 20
    assert train.psnr.dtype == np.float32
    np.testing.assert_array_equal(train.dequantized(np.array([7, 3])), train.dequantized()[[7, 3]])
    assert len(store.load("test")) == 6
    tensors, config, digest = store.field()
    np.testing.assert_array_equal(tensors["w"], FIELD["w"], strict=True)
    assert (config, digest) == ({"width": 3}, "f0")


def test_codes_come_back_within_half_a_bin(home: Home) -> None:
    store = Functaset.open(filled(home / "s"))
    train = store.load("train")
    assert train.codes is not None
    assert train.codes.dtype == np.uint8
    quantizer = store.quantizer(store.fragments[0].id)
    assert quantizer is not None
    error = np.abs(train.dequantized() - latents_of(train.keys))
    assert (error <= quantizer.step / 2 + 1e-6).all()
    rows = np.array([5, 0, 11])
    np.testing.assert_array_equal(train.dequantized(rows), train.dequantized()[rows])


@pytest.mark.parametrize("codec", ["zstd", "exact"])
@pytest.mark.parametrize("granularity", ["scalar", "channel", "element"])
def test_other_zarr_readers_read_codes_and_ranges(tmp_path: Path, granularity: str, codec: str) -> None:
    """tensorstore and plain zarr, at every number of bits: what they dequantise is what we do."""
    import tensorstore
    import zarr

    for bits in range(1, 9):
        place = new_store(tmp_path / str(bits))
        wide = np.concatenate([latents_of(["a", "b", "c"]), np.full((1, *SHAPE), 0.5), np.full((1, *SHAPE), -0.5)])
        quantizer = calibrate(QuantizationConfig(bits=bits, granularity=granularity), wide)
        each = plan(place, n=10, shard_rows=6, quantizer=quantizer, codec=codec)
        for shard in range(each.shards):
            write(place, each, shard, max_clip_fraction=1.0)
        commit(place, [each.id])
        ours = Functaset.open(place).load("train")
        path = tmp_path / str(bits) / each.path

        def read(name: str, path: Path = path) -> np.ndarray:
            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path / name}/"}}
            return np.asarray(tensorstore.open(spec, open=True).result().read().result())

        group = zarr.open_group(str(path), mode="r", zarr_format=3)
        for reader in (read, lambda name, group=group: group[name][:]):
            codes, low, step = (reader(name) for name in ("z", "quantization/low", "quantization/step"))
            np.testing.assert_array_equal(codes, ours.codes)
            assert codes.max() < 2**bits
            np.testing.assert_allclose(low + (codes + np.float32(0.5)) * step, ours.dequantized(), rtol=1e-6, atol=1e-7)
            np.testing.assert_array_equal(reader("label"), ours.labels)
        assert group["quantization"].attrs["bits"] == bits
        assert zarr.open_group(place.uri, mode="r", zarr_format=3).attrs["functaset"] == 1


@pytest.mark.faults
def test_a_second_fingerprint_is_refused_with_the_changed_keys(home: Home) -> None:
    place = new_store(home / "s")
    new_store(home / "s")
    before = tree(home / "s")
    changed = FINGERPRINT | {"inner": {"steps": 4, "loss": "patch"}, "precision": "bf16"}
    with pytest.raises(StorageError) as error:
        create_functaset(place, changed, FIELD, {}, "f0")
    assert "(inner.steps: 3 -> 4, precision: absent -> bf16)" in str(error.value)
    assert "\n" not in str(error.value)
    assert tree(home / "s") == before


def test_only_what_was_committed_is_visible_and_older_versions_stay(home: Home) -> None:
    place = new_store(home / "s")
    first, second = plan(place), plan(place, n=5, first=20)
    with pytest.raises(StorageError, match="nothing is committed yet"):
        Functaset.open(place)
    for shard in range(2):
        write(place, first, shard)
    with pytest.raises(StorageError, match="shard 2 of 3 is not finished"):
        commit(place, [first.id])
    assert latest(place) is None
    assert status(place) == {"done": 2, "left": 2, "images": 16, "bad": 0, "rows": 16, "seconds": 0, "damage": []}
    fill(place, [first])
    one = load_commit(place, 1)
    assert commit(place, [first.id]) == one
    fill(place, [second])
    assert Functaset.open(place).rows("train") == 25
    assert len(Functaset.open(place).load("train")) == 25
    assert len(Functaset.open(place, version=1).load("train")) == 20
    with pytest.raises(StorageError, match="no version 3; versions: 1, 2"):
        Functaset.open(place, version=3)
    with pytest.raises(StorageError, match="no functaset there"):
        Functaset.open(str(home / "none"))


def test_no_image_is_ever_visible_twice(home: Home) -> None:
    place = new_store(home / "s")
    fill(place, [plan(place)])
    overlapping = plan(place, n=4, first=18)
    with pytest.raises(StorageError, match="2 of its images, such as train/000"):
        fill(place, [overlapping])
    assert Functaset.open(place).rows("train") == 20
    fill(place, [plan(place, "test", n=4, first=18)])


@pytest.mark.parametrize("bits", [8, 32])
def test_moments_are_those_of_all_visible_training_latents(tmp_path: Path, bits: int) -> None:
    place = new_store(tmp_path / "s", {"bits": bits})
    fill(place, [plan(place, bits=bits), plan(place, "test", n=6, bits=bits)])
    fill(place, [plan(place, n=7, first=20, bits=bits)])
    store = Functaset.open(place)
    z = store.load("train").dequantized().astype(np.float64)  # [27, s, s, c]
    moments = store.moments()
    assert moments.count == 27
    np.testing.assert_allclose(moments.mean, z.mean(0), atol=1e-12)
    np.testing.assert_allclose(moments.var, z.var(0), rtol=1e-10)


def test_info_answers_what_store_info_shows(tmp_path: Path) -> None:
    place = filled(tmp_path / "s")
    info = json.loads(json.dumps(Functaset.open(place).info(), allow_nan=False))
    expected = {"version": 1, "rows": 26, "rows_by_split": {"train": 20, "test": 6}, "fragments": 2, "shape": [2, 2, 8]}
    assert info.items() >= expected.items()
    assert info["fingerprint"] == FINGERPRINT
    train, test = (Functaset.open(place).load(split).psnr.astype(np.float64) for split in ("train", "test"))
    psnr = np.concatenate([train, test])
    assert info["psnr"]["mean"] == pytest.approx(psnr.mean())
    assert info["psnr"]["by_split"]["test"]["mean"] == pytest.approx(test.mean())
    for q, value in info["psnr"]["quantiles"].items():
        assert value == pytest.approx(np.quantile(psnr, float(q), method="inverted_cdf"), abs=0.06)
    on_disk = sum(p.stat().st_size for p in (tmp_path / "s").rglob("*") if p.is_file())
    assert 0.8 * on_disk < info["bytes"] <= on_disk
    assert info["z_bytes"] == sum(
        p.stat().st_size for p in (tmp_path / "s").glob("fragments/*/z/c/**/*") if p.is_file()
    )


def test_content_is_that_of_the_images_and_choices_and_of_nothing_else(home: Home) -> None:
    def content(name: str, fingerprint: dict[str, int] | None = None, n: int = 12, **changes: Any) -> str:
        place = new_store(home / name, fingerprint)
        each = plan(place, n=n, versions={"torch": name})
        for shard in range(each.shards):
            write(place, each, shard, seconds=len(name), versions={"torch": name}, **changes)
        commit(place, [each.id])
        return Functaset.open(place).content

    first = content("a")
    assert content("another one, later and elsewhere") == first == Functaset.open(str(home / "a")).info()["content"]
    others = {
        content("more", n=13),
        content("choices", {"bits": 7}),
        content("bad", bad={1: "unreadable"}),
        content("changed", sha256=np.zeros((6, 32), np.uint8)),
    }
    assert len(others | {first}) == 5


def test_content_does_not_depend_on_the_order_of_commits_but_on_what_is_retired(home: Home) -> None:
    contents = []
    for name, turn in (("a", 1), ("b", -1)):
        place = new_store(home / name)
        plans = [plan(place, n=5), plan(place, n=5, first=5)]
        for each in plans[::turn]:
            fill(place, [each])
        store = Functaset.open(place)
        contents.append(store.content)
        entries = list(store.commit.fragments)
        entries[0] = entries[0].model_copy(update={"retired": ((3, 4),)})
        retired = store.commit.model_copy(update={"fragments": tuple(entries)})
        contents.append(Functaset(place, retired, store.fingerprint, store.field_digest).content)
    assert contents[0] == contents[2]
    assert len(set(contents)) == 3


def test_a_copy_is_a_functaset_that_decodes_alone(home: Home) -> None:
    place, copy = filled(home / "a"), open_location(str(home / "b"))
    for key in place.list():
        copy.create(key, place.read(key))
    assert tree(home / "a") == tree(home / "b")
    store = Functaset.open(copy)
    assert len(store.load("train")) == 20
    assert store.field()[2] == "f0"


def test_epoch_orders_are_permutations_of_their_seed_and_epoch() -> None:
    orders = [epoch_order(100, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order) == list(range(100))
    assert len({tuple(order) for order in orders}) == 4
    np.testing.assert_array_equal(epoch_order(100, 1, 0), orders[2])


def test_a_functaset_and_its_readers_describe_themselves(tmp_path: Path) -> None:
    place = filled(tmp_path / "s")
    store = Functaset.open(place)
    assert repr(store) == f"Functaset('{place.uri}', version 1: 20 train, 6 test)"
    shown = repr(open_reader(store, "test", "memory"))
    assert shown == f"Resident({place.uri}, version 1, split 'test': 6 rows of (2, 2, 8), codes)"
