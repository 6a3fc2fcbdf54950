"""Repair: only damaged shards are encoded again, under new names, and readers see the same rows as before."""

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from functa.storage.errors import StorageError, TransientError
from functa.storage.functaset.commit import retire
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.history import latest
from functa.storage.places.address import open_location
from functa.storage.places.local import LocalLocation
from functa.storage.upkeep.gc import collect
from functa.storage.upkeep.verify import verify
from functa.tasks.encoding.encode import encode_group
from functa.tasks.encoding.finalise import finalise
from functa.tasks.encoding.plan import EncodeJob, plan
from tests.helpers.storage.functasets import table_of
from tests.helpers.tasks.encoding import encode, encode_job, file_bytes, flip_bit, repair


def encoded(field: Path, store: Path) -> EncodeJob:
    work, _ = encode_job(field, store)
    encode(work)
    return work


def by_key(store: Path) -> dict[str, bytes]:
    loaded = Functaset.open(str(store)).load("train")
    assert loaded.codes is not None
    return {key: code.tobytes() for key, code in zip(loaded.keys, loaded.codes, strict=True)}


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a flipped bit of latents": lambda fragment: flip_bit(fragment / "z/c/1/0/0/0"),
    "a missing column": lambda fragment: (fragment / "label/c/0").unlink(),
    "a shard's moments": lambda fragment: (fragment / "moments/000000.f8").write_bytes(b""),
    "two swapped shards": lambda fragment: (fragment / "psnr/c/0").write_bytes((fragment / "psnr/c/1").read_bytes()),
    "a table of rows": lambda fragment: flip_bit(fragment / "rows/000001.json"),
    "an array's metadata": lambda fragment: flip_bit(fragment / "z/zarr.json"),
    "the quantiser's range": lambda fragment: flip_bit(fragment / "quantization/low/c/0/0/0"),
    "the plan": lambda fragment: flip_bit(fragment / "plan.json"),
}


OFTEN = ("a flipped bit of latents", "a table of rows", "the plan")


@pytest.mark.faults
@pytest.mark.parametrize("what", [pytest.param(w, marks=() if w in OFTEN else pytest.mark.slow) for w in DAMAGE])
def test_only_damaged_shards_are_encoded_again(field: Path, tmp_path: Path, what: str) -> None:
    store = tmp_path / "s"
    work = encoded(field, store)
    if what != "the plan":
        retire(open_location(str(store)), "train", Functaset.open(str(store)).load("train").keys[:3])
    shown, content, count = by_key(store), Functaset.open(str(store)).content, len(file_bytes(store))
    entry = Functaset.open(str(store)).commit.fragments[0]
    DAMAGE[what](store / "fragments" / entry.fragment)
    bad = [each["path"] for each in verify(open_location(str(store)), deep=True).bad]
    assert len(bad) == 1
    damaged = file_bytes(store)
    if "moments" not in what:  # moments are read only to merge them
        with pytest.raises(StorageError):
            by_key(store)
    todo = repair(work)
    whole = "metadata" in what or "range" in what or "plan" in what
    rows = sum(group.images for group in todo.groups)
    assert todo.drop == ((entry.fragment,) if whole else ())
    assert (rows == len(shown)) == whole
    assert damaged.items() <= file_bytes(store).items()  # nothing is overwritten
    assert len(file_bytes(store)) > count
    assert Functaset.open(str(store)).content == content
    after = by_key(store)
    assert after == shown  # the range is the same too, calibrated on the same images
    assert verify(open_location(str(store)), deep=True).bad == []
    assert repair(work).groups == ()


@pytest.mark.faults
@pytest.mark.parametrize("key", ["manifest.safetensors", "receipts/000001.0.json"])
def test_a_damaged_record_is_written_again_from_the_other_and_nothing_is_encoded(
    field: Path, tmp_path: Path, key: str
) -> None:
    store = tmp_path / "s"
    work = encoded(field, store)
    before = file_bytes(store)
    fragment = store / Functaset.open(str(store)).fragments[0].plan.path
    flip_bit(fragment / key)
    assert [each["path"] for each in verify(open_location(str(store))).bad] == [
        str((fragment / key).relative_to(store))
    ]
    assert repair(work).groups == ()
    assert file_bytes(store) == before


def test_a_fragment_without_manifest_and_receipt_is_encoded_again(field: Path, tmp_path: Path) -> None:
    store = tmp_path / "s"
    work = encoded(field, store)
    shown = by_key(store)
    fragment = store / Functaset.open(str(store)).fragments[0].plan.path
    flip_bit(fragment / "manifest.safetensors")
    flip_bit(fragment / "receipts/000001.0.json")
    assert repair(work).drop == (fragment.name,)
    assert by_key(store) == shown
    assert verify(open_location(str(store)), deep=True).bad == []


def test_damage_that_encoding_cannot_repair_is_named_and_nothing_changes(field: Path, tmp_path: Path) -> None:
    store = tmp_path / "s"
    work = encoded(field, store)
    retire(open_location(str(store)), "train", Functaset.open(str(store)).load("train").keys[:3])
    entry = Functaset.open(str(store)).commit.fragments[0]
    flip_bit(store / "fragments" / entry.fragment / "plan.json")
    before = file_bytes(store)
    with pytest.raises(StorageError, match="its plan is damaged, so that it is not known which images were retired"):
        repair(work)
    assert file_bytes(store) == before
    flip_bit(next((store / "fields").glob("*.safetensors")))
    with pytest.raises(StorageError, match=r"fields/feed\.safetensors: .* encoding again does not bring it back"):
        repair(work)
    flip_bit(store / "commits" / "00000002.json")
    with pytest.raises(StorageError, match=r"commits/00000002\.json: .* restore it from a copy"):
        repair(work)


def test_damage_of_an_older_commit_does_not_prevent_repair_and_can_expire(field: Path, tmp_path: Path) -> None:
    store = tmp_path / "s"
    work = encoded(field, store)
    place = open_location(str(store))
    retire(place, "train", Functaset.open(place).load("train").keys[:3])
    shown = by_key(store)
    flip_bit(store / Functaset.open(place).fragments[0].plan.path / "z/c/1/0/0/0")
    flip_bit(store / "commits" / "00000001.json")
    repair(work)
    assert by_key(store) == shown
    assert [each["path"] for each in verify(place, deep=True).bad] == ["commits/00000001.json"]
    collect(place, keep_versions=1, delete=True)
    assert verify(place, deep=True).bad == []
    assert collect(place, delete=True).removed == []


def test_encoding_continues_after_the_repair_of_a_damaged_plan(field: Path, tmp_path: Path) -> None:
    store = tmp_path / "s"
    work = encoded(field, store)
    flip_bit(store / Functaset.open(str(store)).fragments[0].plan.path / "plan.json")
    repair(work)
    before = file_bytes(store)
    encode(work)
    assert file_bytes(store) == before


@pytest.mark.parametrize("damage", ["latents", "latents and receipt", "latents and digests"])
def test_a_repaired_row_has_its_former_label_and_image(field: Path, tmp_path: Path, damage: str) -> None:
    pictures, store = tmp_path / "pictures", tmp_path / "s"

    def put(label: str, number: int, seed: int) -> None:
        (pictures / label).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 255, (8, 8), np.uint8)
        Image.fromarray(pixels).save(pictures / label / f"{number:03}.png")

    for label in "bcd":
        for number in range(20):
            put(label, number, ord(label) * 100 + number)
    work, _ = encode_job(
        field, store, "images.source=folder", "images.channels=1", f"images.location={pictures}",
        "encode.shard_rows=16", "encode.chunk_rows=16", "encode.quantization.max_clip_fraction=0.5",
    )  # fmt: skip
    encode(work)
    before = Functaset.open(str(store)).load("train")
    labels = dict(zip(before.keys, before.labels.tolist()))
    each = Functaset.open(str(store)).fragments[0].plan
    inside = table_of(open_location(str(store)), each, 1).keys
    flip_bit(store / each.path / "z/c/1/0/0/0")
    if "receipt" in damage:
        flip_bit(store / each.path / "receipts/000001.0.json")
    if "digests" in damage:
        flip_bit(store / each.path / "source_sha256/c/1/0")
    put("a", 0, 7)
    put("a", 1, 8)
    label, name = inside[0].split("/")[-2:]
    whole = (pictures / label / name).read_bytes()
    put(label, int(name[:3]), 4711)
    with pytest.raises(StorageError, match=rf" images of damaged shards 1 changed \({inside[0]}\); restore"):
        repair(work)
    status = (pictures / label / name).stat()
    (pictures / label / name).write_bytes(whole)
    os.utime(pictures / label / name, ns=(status.st_atime_ns, status.st_mtime_ns))
    if "digests" not in damage:  # other file times, same bytes
        repair(work)
    else:
        repair(work.model_copy(update={"retire_lost": True}))
    after = Functaset.open(str(store)).load("train")
    known = dict(zip(after.keys, after.labels.tolist()))
    assert known.items() <= labels.items()
    assert labels.keys() - known.keys() == ({inside[0]} if "digests" in damage else set())


def test_an_unreadable_image_ends_the_repair(field: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (60, 8, 8), np.uint8)
    for number, image in enumerate(pixels):
        folder = tmp_path / "x" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number}.png")
    store = tmp_path / "s"
    work, _ = encode_job(
        field, store, "images.source=folder", "images.channels=1", f"images.location={tmp_path / 'x'}",
        "encode.quantization.max_clip_fraction=0.5", "images.max_bad_fraction=1",
    )  # fmt: skip
    encode(work)
    shown = by_key(store)
    flip_bit(store / Functaset.open(str(store)).fragments[0].plan.path / "z/c/0/0/0/0")
    todo = plan(work.model_copy(update={"repair": True}))
    victim = tmp_path / "x" / next(iter(shown)).split("train/")[-1]
    whole, times = victim.read_bytes(), victim.stat()
    victim.write_bytes(b"no picture")
    with pytest.raises(StorageError, match=r"\.png: .*; restore the image, or retire its row: --retire-lost"):
        for group in todo.groups:
            encode_group(work, group, 400)
    victim.write_bytes(whole)
    os.utime(victim, ns=(times.st_atime_ns, times.st_mtime_ns))
    repair(work)
    assert by_key(store) == shown


def test_a_lost_connection_is_not_damage(field: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "s"
    work = encoded(field, store)
    flip_bit(store / Functaset.open(str(store)).fragments[0].plan.path / "z/c/1/0/0/0")
    before = file_bytes(store)

    def away(*_: object) -> None:
        raise TransientError("the store does not answer")

    monkeypatch.setattr("functa.storage.functaset.fragment.Shard.array", away)
    with pytest.raises(TransientError):
        repair(work)
    assert file_bytes(store) == before


def test_a_shard_of_unknown_content_is_retired_on_request(field: Path, tmp_path: Path) -> None:
    store = tmp_path / "s"
    work = encoded(field, store)
    shown = by_key(store)
    each = Functaset.open(str(store)).fragments[0].plan
    lost = table_of(open_location(str(store)), each, 1).keys
    flip_bit(store / each.path / "rows/000001.json")
    flip_bit(store / each.path / "id/c/1/0")
    flip_bit(store / each.path / "z/c/0/0/0/0")
    with pytest.raises(StorageError, match=r"id/c/1/0"):
        repair(work)
    repair(work.model_copy(update={"retire_lost": True}))
    assert by_key(store) == {key: code for key, code in shown.items() if key not in lost}
    assert verify(open_location(str(store)), deep=True).bad == []


def test_repair_of_a_damaged_plan_does_not_encode_erased_images(field: Path, tmp_path: Path) -> None:
    store = tmp_path / "s"
    work = encoded(field, store)
    retire(open_location(str(store)), "train", Functaset.open(str(store)).load("train").keys[:3])
    collect(open_location(str(store)), delete=True, erase_retired=True)
    entry = next(e for e in Functaset.open(str(store)).commit.fragments if e.split == "train")
    flip_bit(store / "fragments" / entry.fragment / "plan.json")
    before = file_bytes(store)
    with pytest.raises(StorageError, match=r"its plan is damaged, .* restore its plan\.json from a copy"):
        repair(work)
    assert file_bytes(store) == before


def test_a_damaged_plan_is_replaced_only_with_the_same_images(field: Path, tmp_path: Path) -> None:
    store = tmp_path / "s"
    work = encoded(field, store)
    entry = Functaset.open(str(store)).commit.fragments[0]
    flip_bit(store / "fragments" / entry.fragment / "plan.json")
    todo = plan(work.model_copy(update={"repair": True}))
    for group in todo.groups:
        encode_group(work, group, 400)
    (fragment,) = todo.contents
    with pytest.raises(StorageError, match=f"fragment {entry.fragment}: its plan is damaged, and the images"):
        finalise(work, todo.model_copy(update={"contents": {fragment: "0" * 64}}))
    assert latest(open_location(str(store))).version == 1  # type: ignore[union-attr]
    finalise(work, todo)
    assert verify(open_location(str(store)), deep=True).bad == []


def test_missing_or_changed_images_end_a_repair_unless_their_rows_are_to_be_retired(
    field: Path, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (60, 8, 8, 1), np.uint8)
    labels = np.arange(60) % 4

    def write(n: int) -> None:
        np.savez(tmp_path / "x.npz", images=pixels[:n], labels=labels[:n])

    write(60)
    store = tmp_path / "s"
    work, _ = encode_job(
        field,
        store,
        "images.source=npz",
        f"images.location={tmp_path / 'x.npz'}",
        "encode.quantization.max_clip_fraction=0.02",
        "encode.shard_rows=16",
        "encode.chunk_rows=16",
    )
    encode(work)
    shown = by_key(store)
    each = Functaset.open(str(store)).fragments[0].plan
    inside = table_of(open_location(str(store)), each, 1)
    flip_bit(store / each.path / "z/c/1/0/0/0")
    by_number = {int(re.findall(r"\d+", key)[-1]): key for key in inside.keys}
    last, other = sorted(by_number)[-1], sorted(by_number)[0]
    pixels[other] ^= 1
    write(last)
    lost = [key for number, key in by_number.items() if number == other or number >= last]
    before = file_bytes(store)
    with pytest.raises(StorageError, match=rf" {len(lost) - 1} are missing \(.*\) and 1 changed \(.*: --retire-lost$"):
        repair(work)
    assert file_bytes(store) == before
    repair(work.model_copy(update={"retire_lost": True}))
    assert by_key(store) == {key: code for key, code in shown.items() if key not in lost}
    assert verify(open_location(str(store)), deep=True).bad == []


def test_a_file_that_the_disk_cannot_read_is_damaged_and_is_encoded_again(
    field: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "s"
    work = encoded(field, store)
    shown = by_key(store)
    sick = f"{Functaset.open(str(store)).fragments[0].plan.path}/z/c/1/0/0/0"
    read = LocalLocation.read

    def failing(self: LocalLocation, key: str, limit: int | None = None) -> bytes:
        with self._translated(key):
            if key == sick:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return read(self, key, limit)

    monkeypatch.setattr(LocalLocation, "read", failing)
    (bad,) = verify(open_location(str(store)), deep=True).bad
    assert bad["path"] == sick
    assert "Input/output error" in bad["fault"]
    repair(work)
    assert by_key(store) == shown
    assert verify(open_location(str(store)), deep=True).bad == []


@pytest.mark.parametrize("what", ["commits/00000001.sha256", "fragments/zarr.json"])
@pytest.mark.parametrize("how", ["missing", "altered"])
def test_objects_that_follow_from_others_are_restored(field: Path, tmp_path: Path, what: str, how: str) -> None:
    store = tmp_path / "s"
    work = encoded(field, store)
    retire(open_location(str(store)), "train", Functaset.open(str(store)).load("train").keys[:3])
    before = file_bytes(store)
    (store / what).unlink()
    if how == "altered":
        (store / what).write_text("{}")
    bad = [each["path"] for each in verify(open_location(str(store))).bad]
    if (what, how) == ("commits/00000001.sha256", "altered"):  # either of the two may be the damaged one
        assert bad == ["commits/00000001.json"]
        return
    assert bad == [what]
    assert repair(work).groups == ()
    assert file_bytes(store) == before


def test_a_fragment_that_was_retired_as_a_whole_is_not_encoded_again(field: Path, tmp_path: Path) -> None:
    store = tmp_path / "s"
    work = encoded(field, store)
    retire(open_location(str(store)), "train", Functaset.open(str(store)).load("train").keys)
    before = file_bytes(store)
    assert plan(work).groups == ()
    encode(work)
    assert file_bytes(store) == before
    assert Functaset.open(str(store)).rows("train") == 0


def test_merged_moments_are_merged_again(field: Path, tmp_path: Path) -> None:
    store = tmp_path / "s"
    work = encoded(field, store)
    moments = Functaset.open(str(store)).moments()
    stored = Functaset.open(str(store)).commit.moments
    assert stored is not None
    flip_bit(store / stored.key)
    with pytest.raises(StorageError, match="was altered"):
        Functaset.open(str(store)).moments()
    repair(work)
    np.testing.assert_array_equal(Functaset.open(str(store)).moments().mean, moments.mean)
    assert verify(open_location(str(store)), deep=True).bad == []
