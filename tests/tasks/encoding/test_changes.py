"""Encode again: new and changed images are encoded and missing ones retired, in one commit."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from functa.storage.errors import StorageError
from functa.storage.functaset.commit import retire
from functa.storage.functaset.fragment import Fragment
from functa.storage.functaset.functaset import Functaset
from functa.storage.places.address import open_location
from functa.storage.upkeep.gc import collect
from functa.storage.upkeep.verify import verify
from functa.tasks.encoding.plan import plan
from functa.tasks.evaluation import reconstruction
from functa.tasks.evaluation.config import EvaluationConfig
from functa.tasks.evaluation.evaluator_input import EvaluationJob
from tests.helpers.tasks.changing_source import job_on_source, planned_images, stored_codes, write_image, write_source
from tests.helpers.tasks.encoding import encode, encode_planned, file_bytes


def test_without_changes_nothing_is_encoded_or_committed(field: Path, tmp_path: Path) -> None:
    write_source(tmp_path / "x")
    work = job_on_source(field, tmp_path)
    encode(work)
    before = file_bytes(tmp_path / "s")
    assert plan(work).groups == ()
    result = encode(work)
    assert result["info"]["rows"] == 36
    assert file_bytes(tmp_path / "s") == before


@pytest.mark.faults
def test_new_changed_and_missing_images_are_one_commit_and_no_other_row_changes(field: Path, tmp_path: Path) -> None:
    write_source(tmp_path / "x")
    work = job_on_source(field, tmp_path)
    encode(work)
    before = stored_codes(tmp_path)
    write_image(tmp_path / "x", "train/a/new.png", 77)
    write_image(tmp_path / "x", "train/a/000.png", 78)
    (tmp_path / "x" / "train/b/001.png").unlink()
    write_image(tmp_path / "x", "test/a/new.png", 79)
    assert planned_images(work) == 3
    encode(work)
    store = Functaset.open(str(tmp_path / "s"))
    assert store.version == 2
    after = stored_codes(tmp_path)
    assert after.keys() - before.keys() == {("train/a/new.png", 0)}
    assert before.keys() - after.keys() == {("train/b/001.png", 0)}
    differ = {name for name in before.keys() & after.keys() if before[name] != after[name]}
    assert differ == {("train/a/000.png", 0)}
    assert store.rows("test") == 7
    ranges = [store.quantizer(entry.fragment) for entry in store.commit.fragments]
    assert len({each.low.tobytes() for each in ranges if each}) == 1  # fixed when the first was planned
    assert verify(open_location(str(tmp_path / "s")), deep=True).bad == []
    mean = store.load("train").dequantized().astype(np.float64).mean(0)
    np.testing.assert_allclose(store.moments().mean, mean, atol=1e-12)


def test_an_image_retired_by_name_is_not_encoded_again_until_it_is_erased(field: Path, tmp_path: Path) -> None:
    write_source(tmp_path / "x")
    work = job_on_source(field, tmp_path)
    encode(work)
    place = open_location(str(tmp_path / "s"))
    retire(place, "train", ["train/a/000.png", "train/b/001.png"])
    write_image(tmp_path / "x", "train/a/000.png", 99)  # changed, but still retired by name
    write_image(tmp_path / "x", "train/a/new.png", 77)
    assert planned_images(work) == 1
    encode(work)
    assert ("train/a/000.png", 0) not in stored_codes(tmp_path)
    (tmp_path / "x" / "train/a/000.png").unlink()
    collect(place, delete=True, erase_retired=True)
    encode(work)
    assert ("train/a/000.png", 0) not in stored_codes(tmp_path)
    assert ("train/b/001.png", 0) in stored_codes(tmp_path)  # the source still has it


def test_an_image_that_reappears_unchanged_is_visible_again(field: Path, tmp_path: Path) -> None:
    write_source(tmp_path / "x", 4)
    work = job_on_source(field, tmp_path)
    encode(work)
    first = stored_codes(tmp_path)
    write_image(tmp_path / "x", "train/a/more.png", 50)
    encode(work)
    for _ in range(2):  # the second time two fragments have used its name
        (tmp_path / "x" / "train/a/more.png").unlink()
        encode(work)
        assert stored_codes(tmp_path) == first
        write_image(tmp_path / "x", "train/a/more.png", 50)
        encode(work)
        assert stored_codes(tmp_path).keys() - first.keys() == {("train/a/more.png", 0)}
    assert Functaset.open(str(tmp_path / "s")).version == 6
    assert verify(open_location(str(tmp_path / "s")), deep=True).bad == []


def test_bad_images_are_tried_again_on_request_or_when_they_change(field: Path, tmp_path: Path) -> None:
    write_source(tmp_path / "x")
    for name in ("000", "002"):
        path = tmp_path / "x" / f"train/a/{name}.png"
        path.write_bytes(b"no picture")
        os.utime(path, ns=(5, 5))
    work = job_on_source(field, tmp_path)
    bad = {each["key"] for each in encode(work)["bad_inputs"]}
    assert bad == {"train/a/000.png", "train/a/002.png"}
    assert planned_images(work) == 0
    write_image(tmp_path / "x", "train/a/000.png", 0)
    assert planned_images(work) == 1
    assert [each["key"] for each in encode(work)["bad_inputs"]] == ["train/a/002.png"]
    write_image(tmp_path / "x", "train/a/002.png", 2)
    retry = work.model_copy(update={"retry_bad": True})
    assert planned_images(retry) == 1
    assert encode(retry)["bad_inputs"] == []
    assert len(stored_codes(tmp_path)) == 30
    assert Functaset.open(str(tmp_path / "s")).info()["bad"] == 0
    assert planned_images(retry) == 0


def test_a_new_class_renumbers_the_labels_of_later_classes(field: Path, tmp_path: Path) -> None:
    write_source(tmp_path / "x")
    work = job_on_source(field, tmp_path)
    encode(work)
    for i in range(4):
        write_image(tmp_path / "x", f"train/aa/{i:03d}.png", 500 + i)
    encode(work)
    train = Functaset.open(str(tmp_path / "s")).load("train")
    numbers = {"a": 0, "aa": 1, "b": 2}
    assert {key: numbers[key.split("/")[1]] for key in train.keys} == dict(zip(train.keys, train.labels.tolist()))
    assert len(train) == 34
    assert planned_images(work) == 0


def test_an_image_retired_by_name_stays_retired_when_it_changes_its_split(field: Path, tmp_path: Path) -> None:
    """Without train/ and test/ folders new images may change the split of others."""
    for i in range(40):
        write_image(tmp_path / "x", f"{'ab'[i % 2]}/{i:03d}.png", i)
    work = job_on_source(field, tmp_path, "images.test_fraction=0.5")
    encode(work)
    place = open_location(str(tmp_path / "s"))
    retired = {split: Functaset.open(place).load(split).keys[:8] for split in ("train", "test")}
    for split, keys in retired.items():
        retire(place, split, keys)
    for i in range(40, 90):
        write_image(tmp_path / "x", f"{'ab'[i % 2]}/{i:03d}.png", i)
    encode(work)
    splits = {split: set(Functaset.open(place).load(split).keys) for split in ("train", "test")}
    assert not (splits["train"] | splits["test"]) & {*retired["train"], *retired["test"]}
    assert not splits["train"] & splits["test"]
    assert sum(map(len, splits.values())) == 90 - 16
    assert planned_images(work) == 0


def test_an_image_retired_by_name_while_its_new_version_is_encoded_stays_retired(field: Path, tmp_path: Path) -> None:
    write_source(tmp_path / "x")
    work = job_on_source(field, tmp_path)
    encode(work)
    write_image(tmp_path / "x", "train/a/000.png", 77)
    write_image(tmp_path / "x", "train/a/002.png", 78)
    todo = plan(work)
    retire(open_location(str(tmp_path / "s")), "train", ["train/a/000.png"])
    encode_planned(work, todo)
    assert len(stored_codes(tmp_path)) == 29
    assert ("train/a/000.png", 0) not in stored_codes(tmp_path)
    assert planned_images(work) == 0


def test_one_bad_new_image_does_not_stop_the_others(field: Path, tmp_path: Path) -> None:
    write_source(tmp_path / "x")
    work = job_on_source(field, tmp_path)
    encode(work)
    (tmp_path / "x" / "train/a/broken.png").write_bytes(b"no picture")
    result = encode(work)
    assert [each["key"] for each in result["bad_inputs"]] == ["train/a/broken.png"]
    assert planned_images(work) == 0


def test_a_changed_image_changes_with_all_its_augmentations(field: Path, tmp_path: Path) -> None:
    write_source(tmp_path / "x", 8)
    work = job_on_source(field, tmp_path, "encode.augmentation.count=2", "encode.augmentation.padding=1")
    encode(work)
    before = stored_codes(tmp_path)
    assert len(before) == 24
    write_image(tmp_path / "x", "train/a/000.png", 123)
    assert planned_images(work) == 3
    encode(work)
    after = stored_codes(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {("train/a/000.png", n) for n in range(3)}


def test_an_encoding_interrupted_before_its_commit_continues(field: Path, tmp_path: Path) -> None:
    write_source(tmp_path / "x")
    work = job_on_source(field, tmp_path)
    encode(work)
    write_image(tmp_path / "x", "train/a/new.png", 77)
    first = plan(work)
    assert plan(work) == first
    assert Fragment.load(open_location(str(tmp_path / "s")), first.fragments[0]).plan.rows == 1
    encode(work)
    assert len(stored_codes(tmp_path)) == 31


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 3)), max_size=4), min_size=1, max_size=3))
def test_after_any_changes_the_functaset_holds_exactly_what_the_source_holds(
    field: Path, tmp_path_factory: pytest.TempPathFactory, rounds: list[list[tuple[int, int]]]
) -> None:
    """(image, state): state 0 means missing, others are its content."""
    tmp_path = tmp_path_factory.mktemp("any")
    write_source(tmp_path / "x", 8)
    work = job_on_source(field, tmp_path, "images.max_gone_fraction=1")
    encode(work)
    states = dict.fromkeys(range(8), -1)
    for changes in rounds:
        for image, state in changes:
            name = f"train/{'ab'[image % 2]}/{image:03d}.png"
            (tmp_path / "x" / name).unlink(missing_ok=True)
            if state:
                write_image(tmp_path / "x", name, 100 * state + image)
            states[image] = state
        if not any(states.values()):
            write_image(tmp_path / "x", "train/a/000.png", 100)
            states[0] = 1
        encode(work)
        train = Functaset.open(str(tmp_path / "s")).load("train")
        assert sorted(train.keys) == sorted(f"train/{'ab'[i % 2]}/{i:03d}.png" for i, s in states.items() if s)
        assert verify(open_location(str(tmp_path / "s")), deep=True).bad == []
        assert planned_images(work) == 0
        assert held(tmp_path) == {
            key: (hashlib.sha256((tmp_path / "x" / key).read_bytes()).digest(), "ab".index(key.split("/")[1]))
            for key in train.keys
        }


def test_a_renamed_file_is_a_new_image_with_the_same_pixels(field: Path, tmp_path: Path) -> None:
    write_source(tmp_path / "x")
    work = job_on_source(field, tmp_path)
    encode(work)
    before = stored_codes(tmp_path)
    (tmp_path / "x/train/a/000.png").rename(tmp_path / "x/train/a/named otherwise.png")
    assert planned_images(work) == 1
    encode(work)
    after = stored_codes(tmp_path)
    assert after.keys() ^ before.keys() == {("train/a/000.png", 0), ("train/a/named otherwise.png", 0)}
    assert after["train/a/named otherwise.png", 0] == before["train/a/000.png", 0]


def test_an_image_moved_to_another_class_or_split_is_retired_where_it_was(field: Path, tmp_path: Path) -> None:
    write_source(tmp_path / "x")
    work = job_on_source(field, tmp_path)
    encode(work)
    (tmp_path / "x/train/a/000.png").rename(tmp_path / "x/train/b/000.png")
    (tmp_path / "x/train/a/002.png").rename(tmp_path / "x/test/a/moved.png")
    assert planned_images(work) == 2
    result = encode(work)
    assert result["info"]["rows_by_split"] == {"train": 29, "test": 7}
    train, test = (Functaset.open(str(tmp_path / "s")).load(split) for split in ("train", "test"))
    assert train.labels[train.keys.index("train/b/000.png")] == 1
    assert "test/a/moved.png" in test.keys
    assert not {"train/a/000.png", "train/a/002.png"} & {*train.keys, *test.keys}


def test_an_encoding_killed_after_its_commit_has_nothing_left_to_do(field: Path, tmp_path: Path) -> None:
    write_source(tmp_path / "x")
    work = job_on_source(field, tmp_path)
    encode(work)
    write_image(tmp_path / "x", "train/a/new.png", 77)
    first = encode(work)  # committed, but the stage record was never written
    before = file_bytes(tmp_path / "s")
    assert plan(work).groups == ()
    assert encode(work) == first
    assert file_bytes(tmp_path / "s") == before


def test_a_changed_test_image_is_not_compared_with_its_old_latent(field: Path, tmp_path: Path) -> None:
    write_source(tmp_path / "x")
    work = job_on_source(field, tmp_path)
    encode(work)

    def measure() -> float:
        figures = reconstruction.measure(
            EvaluationJob(
                seed=0, images=work.images, quantization=work.encode.quantization,
                evaluation=EvaluationConfig(bits=(8,), shown=2), calibration_images=20, functaset=work.functaset,
                field=work.field, output=str(tmp_path / "run"), device="cpu",
            )
        )  # fmt: skip
        return float(figures["psnr_test"])

    before = measure()
    os.utime(tmp_path / "x/test/a/000.png", ns=(5, 5))
    assert measure() == before  # another time, the same bytes
    write_image(tmp_path / "x", "test/a/000.png", 99)
    with pytest.raises(StorageError, match=r"0 of 6 test images .*, 1 changed: restore them, or encode again"):
        measure()
    (tmp_path / "x/test/a/000.png").unlink()
    with pytest.raises(StorageError, match=r"1 of 6 test images .* no longer there or readable, 0 changed"):
        measure()
    encode(work)
    assert measure() != before


def held(tmp_path: Path) -> dict[str, tuple[bytes, int]]:
    """Return (sha256 of the image, label) of every visible training row by key."""
    store = Functaset.open(str(tmp_path / "s"))
    found = {}
    for shard in store.shards("train"):
        digests, labels, keys = shard.array("source_sha256"), shard.array("label"), shard.table().keys
        for row in shard.rows:
            found[keys[row]] = bytes(digests[row]), int(labels[row])
    return found
