"""A functaset at fewer bits: the same rows, none lost, none added, whatever happens on the way."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from functa.storage.config import QuantizationConfig
from functa.storage.errors import StorageError
from functa.storage.functaset.commit import commit
from functa.storage.functaset.fragment import Fragment
from functa.storage.functaset.functaset import Functaset, Latents
from functa.storage.functaset.planning import plan_fragment
from functa.storage.functaset.shards.shard import Shard
from functa.storage.places.address import open_location
from functa.storage.places.local import LocalLocation
from functa.storage.places.location import Location
from functa.storage.upkeep import requantize as requantization
from functa.storage.upkeep.requantize import requantize
from functa.storage.upkeep.verify import verify
from tests.helpers.storage.functasets import SHAPE, fill, filled, new_store, plan, table_of, tree, write

SIX = QuantizationConfig(bits=6, granularity="channel", max_clip_fraction=0.1)


def by_key(latents: Latents) -> dict[str, tuple[int, float, bytes]]:
    """key -> (label, PSNR, id)."""
    columns = zip(latents.keys, latents.labels, latents.psnr, latents.ids, strict=True)
    return {key: (int(label), float(psnr), bytes(identity)) for key, label, psnr, identity in columns}


def tokens_of(store: Functaset) -> dict[str, str]:
    tables = [shard.table() for fragment in store.fragments for shard in fragment.shards]
    return {key: token for table in tables for key, token in zip(table.keys, table.tokens, strict=True)}


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("codec", ["zstd", "exact"])
def test_rows_keep_all_but_their_bits(tmp_path: Path, bits: int, codec: str) -> None:
    source = Functaset.open(filled(tmp_path / "a", bits))
    made = requantize(source, open_location(str(tmp_path / "b")), SIX.model_copy(update={"codec": codec}))
    coded = Functaset.open(str(tmp_path / "b"))
    assert made.version == coded.version == 1
    assert tokens_of(coded) == tokens_of(source)
    for split in ("train", "test"):
        old, new = source.load(split), coded.load(split)
        assert by_key(new) == by_key(old)
        quantizer = new.shards[0].fragment.quantizer
        assert quantizer is not None
        assert quantizer.bits == 6
        places = {key: row for row, key in enumerate(old.keys)}
        before = old.dequantized()[[places[key] for key in new.keys]]
        low, high = quantizer.low, quantizer.low + quantizer.step * 64
        inside = (before > low) & (before < high)
        assert inside.mean() > 0.9
        assert (np.abs(new.dequantized() - before) <= quantizer.step * 0.501)[inside].all()
    np.testing.assert_array_equal(coded.field()[0]["w"], source.field()[0]["w"])
    assert coded.field()[1:] == source.field()[1:]
    z = coded.load("train").dequantized().astype(np.float64)
    np.testing.assert_allclose(coded.moments().mean, z.mean(0), atol=1e-12)
    assert verify(coded.location, deep=True).bad == []


def test_the_fingerprint_names_the_source_functaset(tmp_path: Path) -> None:
    source = Functaset.open(filled(tmp_path / "a"))
    requantize(source, open_location(str(tmp_path / "b")), SIX)
    fingerprint = Functaset.open(str(tmp_path / "b")).fingerprint
    assert fingerprint["requantised_from"] == {"fingerprint": source.commit.fingerprint, "content": source.content}
    assert fingerprint["quantization.bits"] == 6
    assert fingerprint["quantization.calibration_images"] == 20
    assert fingerprint.items() >= source.fingerprint.items()
    assert not [key for key in fingerprint if "clip" in key]


def test_bad_and_retired_rows_stay_behind_and_fragments_become_one(tmp_path: Path) -> None:
    place = new_store(tmp_path / "a")
    second, first = plan(place, n=1, first=12), plan(place, n=12)
    keys = table_of(place, first, 0).keys
    for each in (first, second):
        for shard in range(each.shards):
            write(place, each, shard, bad={2: "not an image"} if (each.id, shard) == (first.id, 0) else None)
    commit(place, [second.id, first.id])
    store = Functaset.open(place)
    small, entry = store.commit.fragments
    entries = (small, entry.model_copy(update={"retired": ((4, 4 + 1),), "rows": entry.rows - 1}))
    changed = store.commit.model_copy(update={"fragments": entries})
    source = Functaset(place, changed, store.fingerprint, store.field_digest)
    requantize(source, open_location(str(tmp_path / "b")), SIX)
    coded = Functaset.open(str(tmp_path / "b"))
    (joined,) = (fragment.plan for fragment in coded.fragments)
    assert joined.shard_rows > second.shard_rows
    assert by_key(coded.load("train")) == by_key(source.load("train"))
    assert coded.rows("train") == 11
    assert not {keys[2], keys[4]} & tokens_of(coded).keys()
    assert coded.info()["bad"] == 0


def test_running_it_again_changes_no_byte_and_reads_no_latent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Functaset.open(filled(tmp_path / "a"))
    made = requantize(source, open_location(str(tmp_path / "b")), SIX)
    before = tree(tmp_path / "b")
    monkeypatch.setattr(Shard, "array", None)
    assert requantize(Functaset.open(source.location), open_location(str(tmp_path / "b")), SIX) == made
    assert tree(tmp_path / "b") == before


@dataclass(frozen=True)
class Mortal(LocalLocation):
    """Dies at the `life`-th thing it is to create."""

    life: int = 0
    made: list[str] = field(default_factory=list)

    def create(self, key: str, data: bytes) -> bool:
        if len(self.made) == self.life:
            raise KeyboardInterrupt
        self.made.append(key)
        return super().create(key, data)


def test_ended_anywhere_it_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    source = Functaset.open(filled(tmp_path / "a", bits=32))
    whole = Mortal(str(tmp_path / "whole"), life=1000)
    requantize(source, whole, SIX)
    expected = tree(tmp_path / "whole")
    # They hold times in seconds.
    timed = {key for key in expected if "/receipts/" in key or "/manifest" in key or key.startswith("commits/")}
    for life in range(1, len(whole.made), 7):
        place = tmp_path / f"b{life}"
        with pytest.raises(KeyboardInterrupt):
            requantize(source, Mortal(str(place), life=life), SIX)
        requantize(source, open_location(str(place)), SIX)
        found = tree(place)
        assert found.keys() == expected.keys()
        assert not {key for key in expected if found[key] != expected[key]} - timed


def test_existing_ranges_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Functaset.open(filled(tmp_path / "a", bits=32))
    place = open_location(str(tmp_path / "b"))

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(requantization, "write_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            requantize(source, place, SIX)
    planned = {key.split("/")[1] for key in place.list("fragments/") if key.endswith("plan.json")}
    monkeypatch.setattr(requantization, "calibrate", stop)  # would be another range on another machine
    made = requantize(source, place, SIX)
    assert {entry.fragment for entry in made.fragments} == planned
    assert {Fragment.load(place, name).split for name in planned} == {"train", "test"}


def test_a_large_source_is_sampled_and_each_shard_read_about_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = new_store(tmp_path / "a", {"bits": 32})
    fill(place, [plan(place, n=48, bits=32), plan(place, n=24, first=48, bits=32)])
    monkeypatch.setattr(requantization, "CALIBRATION_BYTES", 4 * int(np.prod(SHAPE)) * 20)
    read: list[str] = []
    real = Shard.array

    def counted(shard: Shard, name: str) -> np.ndarray:
        read.append(f"{name} {shard.fragment.id} {shard.number}")
        return real(shard, name)

    monkeypatch.setattr(Shard, "array", counted)
    requantize(Functaset.open(place), open_location(str(tmp_path / "b")), SIX)
    info = Functaset.open(str(tmp_path / "b")).info()
    assert info["rows_by_split"] == {"train": 72}
    assert info["fingerprint"]["quantization.calibration_images"] == 16  # of two shards of 8
    z = [what for what in read if what.startswith("z ")]
    assert len(z) <= 9 + 3  # 9 shards; of the sample at most its shards again


def test_progress_counts_rows(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    source = Functaset.open(filled(tmp_path / "a"))
    requantize(source, open_location(str(tmp_path / "b")), SIX, lambda done, rows: calls.append((done, rows)))
    assert calls[-1] == (26, 26)
    assert len(calls) == 4


def test_nonsense_is_refused_in_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    source = Functaset.open(filled(tmp_path / "a", bits=6))
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "note.txt").write_text("mine")
    other = tmp_path / "other"
    requantize(source, open_location(str(other)), SIX)
    grown = filled(tmp_path / "grown", bits=6)
    requantize(Functaset.open(grown), open_location(str(tmp_path / "of-grown")), SIX)
    fill(grown, [plan(grown, n=4, first=20, bits=6)])
    cases = [
        (source, "x", SIX.model_copy(update={"bits": 7}), "has 6 bits a number, which 7 cannot better"),
        (source, "files", SIX, "holds something else; choose an empty location"),
        (source, "a", SIX, "lies in the functaset that it is made from"),
        (source, "a/inside", SIX, "lies in the functaset that it is made from"),
        (source, "other", SIX.model_copy(update={"bits": 5}), "quantization.bits: 6 -> 5"),
        (source, "other", SIX.model_copy(update={"codec": "exact"}), "quantization.codec: zstd -> exact"),
        (Functaset.open(grown), "of-grown", SIX, "requantised_from.content"),
    ]
    before = tree(tmp_path)
    for functaset, name, config, line in cases:
        with pytest.raises(StorageError, match=line) as error:
            requantize(functaset, open_location(str(tmp_path / name)), config)
        assert "\n" not in str(error.value)
    assert tree(tmp_path) == before


def test_a_source_without_rows_is_refused(tmp_path: Path) -> None:
    place = new_store(tmp_path / "a")
    each = plan(place, n=2)
    write(place, each, 0, bad={0: "a", 1: "b"})
    commit(place, [each.id])
    with pytest.raises(StorageError, match="version 1 shows no rows"):
        requantize(Functaset.open(place), open_location(str(tmp_path / "b")), SIX)


def test_damage_in_the_source_is_named_and_nothing_is_shown(tmp_path: Path) -> None:
    source = Functaset.open(filled(tmp_path / "a"))
    shard = sorted((tmp_path / "a").glob("fragments/*/z/c/*/*/*/*"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    with pytest.raises(StorageError, match="was altered"):
        requantize(source, open_location(str(tmp_path / "b")), SIX)
    with pytest.raises(StorageError, match="nothing is committed yet"):
        Functaset.open(str(tmp_path / "b"))


def test_too_much_clipping_fails_a_shard(tmp_path: Path) -> None:
    source = Functaset.open(filled(tmp_path / "a", bits=32))
    narrow = QuantizationConfig(bits=6, range="sigma", sigma=1)
    with pytest.raises(StorageError, match="outside the quantiser's range"):
        requantize(source, open_location(str(tmp_path / "b")), narrow)


def test_psnr_is_that_before_quantisation(tmp_path: Path) -> None:
    source = Functaset.open(filled(tmp_path / "a", bits=32))
    requantize(source, open_location(str(tmp_path / "b")), SIX.model_copy(update={"bits": 1}))
    old, new = source.info(), Functaset.open(str(tmp_path / "b")).info()
    assert new["psnr"]["quantiles"] == old["psnr"]["quantiles"]
    assert json.loads(json.dumps(new))["bits"] == 1


def test_a_source_repaired_meanwhile_puts_no_latent_under_another_id(tmp_path: Path) -> None:
    """The same images in other shards: what was planned of them before is found again by key."""
    place, target = filled(tmp_path / "a", 8), open_location(str(tmp_path / "b"))
    whole = Functaset.open(requantized(place, tmp_path / "whole")).load("train")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        requantize(Functaset.open(place), target, SIX, stop)
    store = Functaset.open(place)
    each = store.fragments[0].plan
    rows = table_of(place, each, 0)
    again = plan_fragment(
        place, rows, split="train", latent_shape=SHAPE, shard_rows=3, chunk_rows=3, quantizer=store.quantizer(each.id),
        replaces=each.id,
    ).plan  # fmt: skip
    for shard in range(again.shards):
        write(place, again, shard)
    commit(place, [again.id], {each.id: range(8)})
    requantize(Functaset.open(place), target, SIX)
    resumed = Functaset.open(target).load("train")
    assert whole.codes is not None
    assert resumed.codes is not None
    assert dict(zip(resumed.keys, map(bytes, resumed.codes), strict=True)) == dict(
        zip(whole.keys, map(bytes, whole.codes), strict=True)
    )


def requantized(place: Location, path: Path) -> str:
    requantize(Functaset.open(place), open_location(str(path)), SIX)
    return str(path)
