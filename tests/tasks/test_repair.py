"""Repair: exactly the damaged shards are encoded again, under new names, and readers see what they saw before."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from storage.collection import collect
from storage.commits import latest
from storage.committing import retire
from storage.config import ImagesConfig
from storage.errors import StorageError
from storage.functaset import Functaset
from storage.locations import open_location
from storage.plans import row_id
from storage.verification import verify
from tasks.encoding.finalise import finalise
from tasks.encoding.group import encode_group
from tasks.encoding.plan import EncodeJob, Planned, plan
from tasks.encoding.planned import PlannedImages
from tests.tasks.test_encoding import bytes_of, encode, job
from tests.tasks.test_encoding import field as field


def repair(work: EncodeJob) -> Planned:
    todo = plan(work.model_copy(update={"repair": True}))
    for group in todo.groups:
        encode_group(work, group, 400)
    finalise(work, todo)
    return todo


def encoded(field: Path, store: Path) -> EncodeJob:
    work, _ = job(field, store)
    encode(work)
    return work


def by_key(store: Path) -> dict[str, bytes]:
    loaded = Functaset.open(str(store)).load("train")
    assert loaded.codes is not None
    return {key: code.tobytes() for key, code in zip(loaded.keys, loaded.codes, strict=True)}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a flipped bit of latents": lambda fragment: flip(fragment / "z/c/1/0/0/0"),
    "a missing column": lambda fragment: (fragment / "label/c/0").unlink(),
    "a receipt": lambda fragment: flip(fragment / "receipts/000001.0.json"),
    "a shard's moments": lambda fragment: (fragment / "moments/000000.f8").write_bytes(b""),
    "two swapped shards": lambda fragment: (fragment / "psnr/c/0").write_bytes((fragment / "psnr/c/1").read_bytes()),
    "a table of rows": lambda fragment: flip(fragment / "rows/000001.json"),
    "an array's metadata": lambda fragment: flip(fragment / "z/zarr.json"),
    "the quantiser's range": lambda fragment: flip(fragment / "quantization/low/c/0/0/0"),
    "the plan": lambda fragment: flip(fragment / "plan.json"),
}


OFTEN = ("a flipped bit of latents", "a table of rows", "the plan")


@pytest.mark.parametrize("what", [pytest.param(w, marks=() if w in OFTEN else pytest.mark.slow) for w in DAMAGE])
def test_what_is_damaged_is_encoded_again_and_only_that(field: Path, tmp_path: Path, what: str) -> None:
    store = tmp_path / "s"
    work = encoded(field, store)
    if what != "the plan":
        retire(open_location(str(store)), "train", Functaset.open(str(store)).load("train").keys[:3])
    shown, content, count = by_key(store), Functaset.open(str(store)).content, len(bytes_of(store))
    entry = Functaset.open(str(store)).fragments[0][0]
    DAMAGE[what](store / "fragments" / entry.fragment)
    bad = [each["path"] for each in verify(open_location(str(store)), deep=True).bad]
    assert len(bad) == 1
    damaged = bytes_of(store)
    if "moments" not in what:  # those are read when they are merged
        with pytest.raises(StorageError):
            by_key(store)
    todo = repair(work)
    whole = "metadata" in what or "range" in what or "plan" in what
    rows = sum(group.images for group in todo.groups)
    assert todo.drop == ((entry.fragment,) if whole else ())
    assert (rows == len(shown)) == whole
    assert damaged.items() <= bytes_of(store).items()  # nothing is overwritten
    assert len(bytes_of(store)) > count
    assert Functaset.open(str(store)).content == content
    after = by_key(store)
    assert after == shown  # the range too comes out as it was, calibrated on the same images
    assert verify(open_location(str(store)), deep=True).bad == []
    assert repair(work).groups == ()


def test_damage_that_encoding_cannot_mend_is_named_and_nothing_changes(field: Path, tmp_path: Path) -> None:
    store = tmp_path / "s"
    work = encoded(field, store)
    retire(open_location(str(store)), "train", Functaset.open(str(store)).load("train").keys[:3])
    entry = Functaset.open(str(store)).fragments[0][0]
    flip(store / "fragments" / entry.fragment / "plan.json")
    before = bytes_of(store)
    with pytest.raises(StorageError, match="its plan is damaged, and which images were retired with it"):
        repair(work)
    assert bytes_of(store) == before
    flip(store / "commits" / "00000001.json")
    with pytest.raises(StorageError, match=r"commits/00000001\.json: .* encoding again does not bring it back"):
        repair(work)


def test_a_lost_plan_brings_no_erased_image_back(field: Path, tmp_path: Path) -> None:
    store = tmp_path / "s"
    work = encoded(field, store)
    retire(open_location(str(store)), "train", Functaset.open(str(store)).load("train").keys[:3])
    collect(open_location(str(store)), delete=True, erase_retired=True)
    entry = next(e for e, _ in Functaset.open(str(store)).fragments if e.split == "train")
    flip(store / "fragments" / entry.fragment / "plan.json")
    before = bytes_of(store)
    with pytest.raises(StorageError, match=r"its plan is lost, .* restore its plan\.json from a copy"):
        repair(work)
    assert bytes_of(store) == before


def test_a_lost_plan_is_replaced_by_the_same_images_only(field: Path, tmp_path: Path) -> None:
    store = tmp_path / "s"
    work = encoded(field, store)
    entry = Functaset.open(str(store)).fragments[0][0]
    flip(store / "fragments" / entry.fragment / "plan.json")
    todo = plan(work.model_copy(update={"repair": True}))
    for group in todo.groups:
        encode_group(work, group, 400)
    (fragment,) = todo.contents
    with pytest.raises(StorageError, match=f"fragment {entry.fragment}: its plan is lost, and the images"):
        finalise(work, todo.model_copy(update={"contents": {fragment: "0" * 64}}))
    assert latest(open_location(str(store))).version == 1  # type: ignore[union-attr]
    finalise(work, todo)
    assert verify(open_location(str(store)), deep=True).bad == []


def test_a_repair_whose_images_are_gone_says_so(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 8, 8, 1), np.uint8)

    def write(n: int) -> None:
        np.savez(tmp_path / "x.npz", images=pixels[:n], labels=np.arange(n) % 4)

    write(40)
    images = ImagesConfig(source="npz", location=str(tmp_path / "x.npz"))
    source = PlannedImages(images)
    keys = [key for split in ("train", "test") for key in source.images.split(split).keys]
    assert sorted(source.now({row_id(key) for key in keys}).keys) == sorted(keys)
    write(39)
    with pytest.raises(StorageError, match="1 of 40 images of damaged shards are no longer in the source"):
        PlannedImages(images).now({row_id(key) for key in keys})


def test_merged_moments_are_merged_again(field: Path, tmp_path: Path) -> None:
    store = tmp_path / "s"
    work = encoded(field, store)
    moments = Functaset.open(str(store)).moments()
    stored = Functaset.open(str(store)).commit.moments
    assert stored is not None
    flip(store / stored.key)
    with pytest.raises(StorageError, match="was altered"):
        Functaset.open(str(store)).moments()
    repair(work)
    np.testing.assert_array_equal(Functaset.open(str(store)).moments().mean, moments.mean)
    assert verify(open_location(str(store)), deep=True).bad == []
