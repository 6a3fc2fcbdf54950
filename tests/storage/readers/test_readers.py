"""Readers: every visible row exactly once, in an order of (seed, epoch), and nothing that was not checked."""

import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from functa.models.config import NormalizationConfig
from functa.models.latents.normalize import Normalizer, normalizer
from functa.storage.config import QuantizationConfig
from functa.storage.errors import StorageError
from functa.storage.functaset.commit import commit
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.plan import RowTable
from functa.storage.functaset.planning import plan_fragment
from functa.storage.functaset.quantizer import calibrate
from functa.storage.places.address import open_location
from functa.storage.readers import free_memory as limits
from functa.storage.readers import open as readers
from functa.storage.readers.hydrate import hydrate
from functa.storage.readers.open import open_reader
from functa.storage.readers.order import Order
from functa.storage.readers.reader import Batch, Indexed, Reader
from functa.storage.readers.streamed import Streamed
from functa.tasks.inputs.batches import FromHost, OnDevice
from functa.tasks.inputs.latents import load_split, training_normalizer
from functa.tasks.inputs.torch_datasets import LatentDataset, LatentStream
from tests.helpers.storage.functasets import (
    FINGERPRINT,
    SHAPE,
    damage,
    fill,
    filled,
    latents_of,
    new_store,
    plan,
    store_with_bad_rows,
    write,
)

KINDS = ("memory", "mapped", "streamed")


def opened(functaset: Functaset, kind: str, **options: Any) -> Reader:
    if kind == "mapped":
        hydrate(functaset)
    return open_reader(functaset, "train", kind, buffer_shards=2, **options)  # type: ignore[arg-type]


def seen(batches: Iterator[Batch]) -> list[bytes]:
    return [bytes(row) for batch in batches for row in batch.ids]  # type: ignore[union-attr]


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_load_whatever_the_reader(tmp_path: Path, kind: str, bits: int) -> None:
    functaset = store_with_bad_rows(tmp_path / "s", bits)
    reader, everything = opened(functaset, kind), functaset.load("train")
    rows = {bytes(name): row for row, name in enumerate(everything.ids)}
    assert reader.rows == len(everything) == functaset.rows("train") < 33
    batches = list(reader.batches(Order(5, seed=3), ids=True))
    assert sorted(seen(iter(batches))) == sorted(rows)
    for batch in batches:
        there = np.array([rows[bytes(name)] for name in batch.ids])  # type: ignore[union-attr]
        assert batch.z.dtype == (np.uint8 if bits == 8 else np.float32)
        assert batch.labels.dtype == np.int32
        np.testing.assert_array_equal(batch.labels, everything.labels[there])
        plain = everything.dequantized(there)
        np.testing.assert_allclose(reader.dequantized(batch), plain, rtol=0, atol=1e-6 if bits == 8 else 0)
    stored = list(reader.batches(Order(5, shuffle=False), ids=True))
    assert seen(iter(stored)) == [bytes(name) for name in everything.ids]


@cache
def readers_of(folder: str, bits: int) -> dict[str, Reader]:
    functaset = store_with_bad_rows(Path(folder), bits)
    hydrate(functaset, f"{folder}-raw")
    return {
        kind: open_reader(functaset, "train", kind, hydrated=f"{folder}-raw", buffer_shards=3)  # type: ignore[arg-type]
        for kind in KINDS
    }


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(KINDS), batch=st.integers(1, 40), world=st.integers(1, 5), seed=st.integers(0, 9),
    epoch=st.integers(0, 3), drop_last=st.booleans(), resume=st.floats(0, 1),
)  # fmt: skip
def test_ranks_see_every_row_once_in_equally_many_steps_and_go_on_where_they_stopped(
    tmp_path_factory: pytest.TempPathFactory, kind: str, batch: int, world: int, seed: int, epoch: int,
    drop_last: bool, resume: float,
) -> None:  # fmt: skip
    folder = tmp_path_factory.getbasetemp() / "hypothesis"
    reader = readers_of(str(folder), 8)[kind]
    dealt: list[bytes] = []
    lengths = []
    for rank in range(world):
        order = Order(batch, seed, drop_last=drop_last, rank=rank, world=world)
        batches = list(reader.batches(order, epoch, ids=True))
        assert len(batches) == order.steps(reader.rows)
        assert all(len(each) == batch for each in batches[: reader.rows // (batch * world)])
        lengths.append([len(each) for each in batches])
        step = int(resume * len(batches))
        later = list(reader.batches(order, epoch, step, ids=True, reuse=False))
        assert seen(iter(later)) == seen(iter(batches[step:]))
        assert [len(each) for each in later] == lengths[-1][step:]
        dealt += seen(iter(batches))
    assert len(set(dealt)) == len(dealt)
    assert len(dealt) == (reader.rows // (batch * world) * batch * world if drop_last else reader.rows)
    assert max(max(row) - min(row) for row in zip(*lengths)) <= 1 if lengths[0] else True


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_is_a_function_of_seed_and_epoch(tmp_path: Path, kind: str) -> None:
    reader = opened(Functaset.open(filled(tmp_path / "s")), kind)
    orders = {(s, e): tuple(seen(reader.batches(Order(7, seed=s), e, ids=True))) for s in (0, 1) for e in (0, 1)}
    assert len(set(orders.values())) == 4
    assert tuple(seen(reader.batches(Order(7, seed=1), 0, ids=True))) == orders[1, 0]


def test_a_stream_has_hardly_any_image_twice_in_a_batch(tmp_path: Path) -> None:
    """Augmentations of an image lie side by side; a full shuffle has 15.9 different ones in 16 rows."""
    place, images, each = new_store(tmp_path / "s", FINGERPRINT | {"augmentation.count": 4}), 200, 5
    keys = [f"train/{i:05d}" for i in range(images) for _ in range(each)]
    table = RowTable.of(keys, np.zeros(len(keys), np.int32), keys, np.tile(np.arange(each, dtype=np.int32), images))
    quantizer = calibrate(QuantizationConfig(bits=8), latents_of(keys[::each]))
    fill(place, [plan_fragment(place, table, split="train", latent_shape=SHAPE, shard_rows=20, chunk_rows=10,
                               codec="zstd", quantizer=quantizer).plan])  # fmt: skip
    reader = open_reader(Functaset.open(place), "train", "streamed", buffer_shards=4)
    different = []
    for epoch in range(2):
        batches = list(reader.batches(Order(16), epoch, ids=True))
        assert set(Counter(seen(iter(batches))).values()) == {each}
        different += [len({bytes(row) for row in batch.ids}) for batch in batches[:-1]]  # type: ignore[union-attr]
    assert np.mean(different) > 15  # 11.5 where four shards at a time are shuffled


def test_more_rows_that_wait_than_expected_get_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = opened(Functaset.open(filled(tmp_path / "s")), "streamed")
    expected = [(seen(iter([batch])), batch.z.tolist()) for batch in reader.batches(Order(3), 1, ids=True)]
    monkeypatch.setattr(Streamed, "_places", lambda *_: 1)
    assert [(seen(iter([batch])), batch.z.tolist()) for batch in reader.batches(Order(3), 1, ids=True)] == expected


def test_limits_of_a_process_count_as_the_memory_that_is_free() -> None:
    """Limits are those of `ulimit -d` and `ulimit -v`, in a process of its own."""
    script = (
        "import resource, psutil\n"
        "from functa.storage.readers.free_memory import free_memory\n"
        "assert free_memory() > 1 << 28\n"
        "used = psutil.Process().memory_info()\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (used.data + (200 << 20), -1))\n"
        "assert 150 << 20 < free_memory() <= 201 << 20\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used.vms + (100 << 20), -1))\n"
        "assert 50 << 20 < free_memory() <= 101 << 20\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("membership", "limited"),
    [("0::/jobs/one", "jobs"), ("4:memory:/jobs/one\n0::/", "memory/jobs/one"), ("0::/not/seen/here", "")],
    ids=["outer-group", "first-version", "container"],
)
def test_limits_of_every_control_group_around_a_process_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, membership: str, limited: str
) -> None:
    names = limits.FILES[1 if limited.startswith("memory") else 2]
    for folder in ("jobs/one", "memory/jobs/one", limited):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for name, value in zip((*names[:2], "memory.stat"), ("1000000", "400000", f"{names[2]} 1000"), strict=True):
        (tmp_path / limited / name).write_text(value)
    (tmp_path / "cgroup").write_text(membership)
    monkeypatch.setattr(limits, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(limits, "MEMBERSHIP", tmp_path / "cgroup")
    assert limits.free_memory() == 601_000


@pytest.mark.parametrize("kind", KINDS)
def test_a_reused_buffer_holds_the_same_rows(tmp_path: Path, kind: str) -> None:
    reader = opened(Functaset.open(filled(tmp_path / "s")), kind)
    fresh = [batch.z for batch in reader.batches(Order(6), 2)]
    places = set()
    for batch, expected in zip(reader.batches(Order(6), 2, reuse=True), fresh, strict=True):
        np.testing.assert_array_equal(batch.z, expected)
        places.add(batch.z.__array_interface__["data"][0])
    assert len(places) == 1


def test_a_resumed_stream_does_not_read_the_shards_that_were_consumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = new_store(tmp_path / "s")
    fill(place, [plan(place, n=80, shard_rows=4)])
    reader = open_reader(Functaset.open(place), "train", "streamed", buffer_shards=1)
    read: list[int] = []
    real = reader._split.read  # type: ignore[attr-defined]
    monkeypatch.setattr(reader._split, "read", lambda shard, ids: (read.append(shard.number), real(shard, ids))[1])  # type: ignore[attr-defined]
    list(reader.batches(Order(4), step=15))
    # Two shards in memory spread rows over four: the first 60 rows hold all of the first 11 of 20 shards, at least.
    assert len(read) == 9


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    functaset = Functaset.open(filled(tmp_path / "s"))
    for wrong in ({"batch": 0}, {"batch": 1, "seed": -1}, {"batch": 1, "rank": 2, "world": 2}):
        with pytest.raises(ValueError, match="batch is 1 at least"):
            Order(**wrong)
    reader = open_reader(functaset, "train", "memory")
    with pytest.raises(ValueError, match="steps 0 to 4"):
        reader.batches(Order(6), step=5)
    with pytest.raises(IndexError, match="rows 3 to 20 of 20"):
        reader.read(np.array([3, 20]))  # type: ignore[attr-defined]
    with pytest.raises(StorageError, match="has no rows of split 'validation'"):
        open_reader(functaset, "validation")
    with pytest.raises(StorageError, match="run `functa store hydrate`"):
        open_reader(functaset, "train", "mapped")


def test_the_kind_follows_from_free_memory_and_what_can_be_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coded, floats = (Functaset.open(filled(tmp_path / str(bits), bits)) for bits in (8, 32))

    def kinds() -> list[str]:
        return [type(open_reader(each, "train")).__name__ for each in (coded, floats)]

    assert limits.free_memory() > 1 << 20
    assert kinds() == ["Resident", "Resident"]
    monkeypatch.setattr(readers, "free_memory", lambda: 1000)
    assert kinds() == ["Streamed", "Mapped"]
    hydrate(coded)
    assert kinds() == ["Mapped", "Mapped"]


@pytest.mark.faults
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("kind", ["memory", "mapped", "streamed"])
@pytest.mark.parametrize("how", ["missing", "short", "flipped", "swapped"])
def test_damage_is_named_and_never_shown(tmp_path: Path, kind: str, bits: int, how: str) -> None:
    """The store's own objects; mapped float32 shards lie in the store, and coded ones are found when hydrated."""
    functaset = Functaset.open(filled(tmp_path / "s", bits))
    path = tmp_path / "s" / "fragments" / functaset.fragments[0].id / "z" / "c"
    if how == "swapped":
        os.rename(path / "0", path / "x")
        os.rename(path / "1", path / "0")
        os.rename(path / "x", path / "1")
    else:
        damage(path / "1" / "0" / "0" / "0", how)
    with pytest.raises(StorageError, match=r"z/c/[01]/0/0/0: ") as error:
        reader = opened(functaset, kind) if bits == 8 else open_reader(functaset, "train", kind)  # type: ignore[arg-type]
        list(reader.batches(Order(20)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fork_is_refused_with_a_message_that_names_the_fix(tmp_path: Path, kind: str) -> None:
    functaset = Functaset.open(filled(tmp_path / "s"))
    reader = opened(functaset, kind)
    batches = reader.batches(Order(5))
    next(batches)
    there, here = os.pipe()
    if os.fork() == 0:
        messages = []
        for act in (lambda: next(batches), lambda: reader.batches(Order(5)), lambda: functaset.load("train")):
            try:
                act()
                messages.append("nothing")
            except StorageError as error:
                messages.append(str(error))
        os.write(here, "\n".join(messages).encode())
        os._exit(0)
    os.close(here)
    os.wait()
    lines = os.read(there, 65536).decode().splitlines()
    assert len(lines) == 3 and all("multiprocessing_context='spawn'" in line for line in lines)
    assert len(list(batches)) == 3


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_data_loader_workers_are_spawned_and_a_forked_one_is_refused(tmp_path: Path) -> None:
    uri = filled(tmp_path / "s").uri
    stream = LatentStream(uri, "train", Order(6, seed=1), kind="memory")
    alone = [labels.tolist() for _, labels in stream]
    stream.resume(0)
    spawned = DataLoader(stream, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    assert [labels.tolist() for _, labels in spawned] == alone
    with pytest.raises(StorageError, match="multiprocessing_context='spawn'"):
        list(DataLoader(stream, batch_size=None, num_workers=1, multiprocessing_context="fork"))


def test_torch_data_sets_give_normalised_latents(tmp_path: Path) -> None:
    functaset = store_with_bad_rows(tmp_path / "s")
    built = training_normalizer(functaset, NormalizationConfig(kind="array", gamma=2.0))
    everything = functaset.load("train")
    expected = built.normalize(torch.from_numpy(everything.dequantized()))
    whole = LatentDataset(functaset.location.uri, "train", normalizer=built)
    x, labels = next(iter(DataLoader(whole, batch_size=len(whole))))
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
    assert labels.tolist() == everything.labels.tolist() and labels.dtype == torch.int64
    torch.testing.assert_close(whole[4][0], expected[4], rtol=1e-5, atol=1e-5)
    stream = LatentStream(
        functaset.location.uri, "train", Order(4, shuffle=False), normalizer=built, codes=True, kind="streamed"
    )
    assert stream.affine is not None
    assert len(stream) == 8
    got = torch.cat([stream.affine(codes, which) for codes, _, which in stream])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    stream.resume(0, step=7)
    assert len(list(stream)) == 1


def bound(normalizer: Normalizer, scale: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Return float32's error in code * scale + offset: a few units in the last place of the largest term."""
    return 4 * np.finfo(np.float32).eps * (255 * np.abs(scale) + np.abs(offset)) / normalizer.scale.numpy() + 1e-12


@settings(deadline=None, max_examples=40)
@given(kind=st.sampled_from(["scalar", "vector", "array"]), gamma=st.floats(0.1, 10), seed=st.integers(0, 99))
def test_fused_normalisation_is_the_plain_one_within_rounding(kind: str, gamma: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    scale, offset = random.uniform(1e-5, 1e-2, (1, *SHAPE)), random.normal(0, 0.5, (1, *SHAPE))
    codes = random.integers(0, 256, (16, *SHAPE)).astype(np.uint8)
    z = codes * scale + offset
    built = normalizer(NormalizationConfig(kind=kind, gamma=gamma), z.mean(0), z.var(0))
    exact = (z - built.mean.double().numpy()) / built.scale.double().numpy()
    fused = built.fused(scale, offset)(torch.from_numpy(codes)).numpy()
    plain = built.normalize(torch.from_numpy(z.astype(np.float32))).numpy()
    allowed = bound(built, scale, np.abs(offset) + np.abs(built.mean.numpy()))
    assert (np.abs(fused - exact) <= allowed).all()
    assert (np.abs(fused - plain) <= 2 * allowed).all()


@pytest.mark.parametrize("bits", [8, 32])
def test_training_latents_are_the_normalised_split(tmp_path: Path, bits: int) -> None:
    functaset = store_with_bad_rows(tmp_path / "s", bits)
    built = training_normalizer(functaset, NormalizationConfig(kind="vector"))
    split, tolerance = load_split(functaset, "train"), 1e-5 if bits == 8 else 0
    reader, cpu = open_reader(functaset, "train", "memory"), torch.device("cpu")
    assert isinstance(reader, Indexed)
    rows = np.array([5, 0, 28, 28, 17])
    for x, labels in (
        OnDevice(reader, built, lambda step: rows, slice(1, 4), cpu)(0),
        FromHost(reader, built, lambda step: rows, slice(1, 4), cpu, steps=1)(0),
    ):
        assert labels.tolist() == split.labels[rows[1:4]].tolist()
        torch.testing.assert_close(x, built.normalize(split.z[rows[1:4]]), rtol=tolerance, atol=tolerance)


def test_memory_of_a_stream_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """numpy's own allocations, between the first batch and the last."""
    peaks = []
    for count in (1000, 3000):
        place = new_store(tmp_path / str(count), {"bits": 32})
        keys = plan(place, n=count, bits=32, shard_rows=100, chunk_rows=50, latent_shape=(4, 4, 16))
        for shard in range(keys.shards):
            z = np.zeros((keys.shard_size(shard), 4, 4, 16), np.float32)
            write(place, keys, shard, latents=z)
        commit(place, [keys.id])
        reader = open_reader(Functaset.open(open_location(place.uri)), "train", "streamed", buffer_shards=2)
        tracemalloc.start()
        assert sum(len(batch) for batch in reader.batches(Order(64))) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]  # three times the rows; a shard more or less is ahead when the peak is taken
