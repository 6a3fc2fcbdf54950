"""Encoding again: what is new or changed is encoded, what is gone is retired, in one commit, or nothing happens."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from functa.storage.errors import StorageError
from functa.storage.functaset.commit import retire
from functa.storage.functaset.fragment import Fragment
from functa.storage.functaset.functaset import Functaset
from functa.storage.places.address import open_location
from functa.storage.upkeep.gc import collect
from functa.storage.upkeep.verify import verify
from functa.tasks.encoding.encode import encode_group
from functa.tasks.encoding.finalise import finalise
from functa.tasks.encoding.plan import EncodeJob, plan
from functa.tasks.evaluation import reconstruction
from functa.tasks.evaluation.bench import EvaluationJob
from functa.tasks.evaluation.config import EvaluationConfig
from tests.tasks.encoding.test_encode import bytes_of, encode, job
from tests.tasks.encoding.test_encode import field as field


def put(folder: Path, name: str, seed: int) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8), np.uint8)).save(path)
    os.utime(path, ns=(10**18 + seed, 10**18 + seed))  # a content is a token, as it is of files in a set


def start(folder: Path, n: int = 30) -> None:
    for split, count in (("train", n), ("test", 6)):
        for i in range(count):
            put(folder, f"{split}/{'ab'[i % 2]}/{i:03d}.png", 1000 * (split == "test") + i)


def work_on(field: Path, tmp_path: Path, *more: str) -> EncodeJob:
    return job(
        field, tmp_path / "s", "images.source=folder", "images.channels=1", f"images.location={tmp_path / 'x'}",
        "encode.quantization.max_clip_fraction=1", "images.max_bad_fraction=0.2", "encode.shard_rows=8",
        "encode.chunk_rows=8", *more,
    )[0]  # fmt: skip


def codes(tmp_path: Path, split: str = "train") -> dict[tuple[str, int], bytes]:
    loaded = Functaset.open(str(tmp_path / "s")).load(split)
    assert loaded.codes is not None
    names = zip(loaded.keys, loaded.augmentation.tolist(), strict=True)
    return dict(zip(names, map(bytes, loaded.codes), strict=True))


def planned_images(work: EncodeJob) -> int:
    return sum(group.images for group in plan(work).groups)


def test_nothing_new_is_no_shard_and_no_commit(field: Path, tmp_path: Path) -> None:
    start(tmp_path / "x")
    work = work_on(field, tmp_path)
    encode(work)
    before = bytes_of(tmp_path / "s")
    assert plan(work).groups == ()
    told = encode(work)
    assert told["info"]["rows"] == 36
    assert bytes_of(tmp_path / "s") == before


def test_new_changed_and_gone_images_are_one_commit_and_no_other_row_moves(field: Path, tmp_path: Path) -> None:
    start(tmp_path / "x")
    work = work_on(field, tmp_path)
    encode(work)
    before = codes(tmp_path)
    put(tmp_path / "x", "train/a/new.png", 77)
    put(tmp_path / "x", "train/a/000.png", 78)
    (tmp_path / "x" / "train/b/001.png").unlink()
    put(tmp_path / "x", "test/a/new.png", 79)
    assert planned_images(work) == 3
    encode(work)
    store = Functaset.open(str(tmp_path / "s"))
    assert store.version == 2
    after = codes(tmp_path)
    assert after.keys() - before.keys() == {("train/a/new.png", 0)}
    assert before.keys() - after.keys() == {("train/b/001.png", 0)}
    differ = {name for name in before.keys() & after.keys() if before[name] != after[name]}
    assert differ == {("train/a/000.png", 0)}
    assert store.rows("test") == 7
    ranges = [store.quantizer(entry.fragment) for entry in store.commit.fragments]
    assert len({each.low.tobytes() for each in ranges if each}) == 1  # frozen when the first was planned
    assert verify(open_location(str(tmp_path / "s")), deep=True).bad == []
    mean = store.load("train").dequantized().astype(np.float64).mean(0)
    np.testing.assert_allclose(store.moments().mean, mean, atol=1e-12)


def test_what_was_retired_by_name_stays_away_until_it_is_erased(field: Path, tmp_path: Path) -> None:
    start(tmp_path / "x")
    work = work_on(field, tmp_path)
    encode(work)
    place = open_location(str(tmp_path / "s"))
    retire(place, "train", ["train/a/000.png", "train/b/001.png"])
    put(tmp_path / "x", "train/a/000.png", 99)  # changed: still the image that nobody wants
    put(tmp_path / "x", "train/a/new.png", 77)
    assert planned_images(work) == 1
    encode(work)
    assert ("train/a/000.png", 0) not in codes(tmp_path)
    (tmp_path / "x" / "train/a/000.png").unlink()
    collect(place, delete=True, erase_retired=True)
    encode(work)
    assert ("train/a/000.png", 0) not in codes(tmp_path)
    assert ("train/b/001.png", 0) in codes(tmp_path)  # the source still has it


def test_an_image_that_comes_back_as_it_was_is_shown_again(field: Path, tmp_path: Path) -> None:
    start(tmp_path / "x", 4)
    work = work_on(field, tmp_path)
    encode(work)
    first = codes(tmp_path)
    put(tmp_path / "x", "train/a/more.png", 50)
    encode(work)
    for _ in range(2):  # the second time its fragment's name is taken twice
        (tmp_path / "x" / "train/a/more.png").unlink()
        encode(work)
        assert codes(tmp_path) == first
        put(tmp_path / "x", "train/a/more.png", 50)
        encode(work)
        assert codes(tmp_path).keys() - first.keys() == {("train/a/more.png", 0)}
    assert Functaset.open(str(tmp_path / "s")).version == 6
    assert verify(open_location(str(tmp_path / "s")), deep=True).bad == []


def test_bad_images_are_tried_again_where_that_is_asked_for_or_when_they_change(field: Path, tmp_path: Path) -> None:
    start(tmp_path / "x")
    for name in ("000", "002"):
        path = tmp_path / "x" / f"train/a/{name}.png"
        path.write_bytes(b"no picture")
        os.utime(path, ns=(5, 5))
    work = work_on(field, tmp_path)
    bad = {each["key"] for each in encode(work)["bad_inputs"]}
    assert bad == {"train/a/000.png", "train/a/002.png"}
    assert planned_images(work) == 0
    put(tmp_path / "x", "train/a/000.png", 0)
    assert planned_images(work) == 1
    assert [each["key"] for each in encode(work)["bad_inputs"]] == ["train/a/002.png"]
    put(tmp_path / "x", "train/a/002.png", 2)
    retry = work.model_copy(update={"retry_bad": True})
    assert planned_images(retry) == 1
    assert encode(retry)["bad_inputs"] == []
    assert len(codes(tmp_path)) == 30
    assert Functaset.open(str(tmp_path / "s")).info()["bad"] == 0
    assert planned_images(retry) == 0


def test_a_class_that_comes_between_gives_every_image_its_new_label(field: Path, tmp_path: Path) -> None:
    start(tmp_path / "x")
    work = work_on(field, tmp_path)
    encode(work)
    for i in range(4):
        put(tmp_path / "x", f"train/aa/{i:03d}.png", 500 + i)
    encode(work)
    train = Functaset.open(str(tmp_path / "s")).load("train")
    numbers = {"a": 0, "aa": 1, "b": 2}
    assert {key: numbers[key.split("/")[1]] for key in train.keys} == dict(zip(train.keys, train.labels.tolist()))
    assert len(train) == 34
    assert planned_images(work) == 0


def test_an_image_retired_by_name_stays_away_when_it_changes_its_split(field: Path, tmp_path: Path) -> None:
    """Without train/ and test/ newcomers move the border between the two."""
    for i in range(40):
        put(tmp_path / "x", f"{'ab'[i % 2]}/{i:03d}.png", i)
    work = work_on(field, tmp_path, "images.test_fraction=0.5")
    encode(work)
    place = open_location(str(tmp_path / "s"))
    gone = {split: Functaset.open(place).load(split).keys[:8] for split in ("train", "test")}
    for split, keys in gone.items():
        retire(place, split, keys)
    for i in range(40, 90):
        put(tmp_path / "x", f"{'ab'[i % 2]}/{i:03d}.png", i)
    encode(work)
    splits = {split: set(Functaset.open(place).load(split).keys) for split in ("train", "test")}
    assert not (splits["train"] | splits["test"]) & {*gone["train"], *gone["test"]}
    assert not splits["train"] & splits["test"]
    assert sum(map(len, splits.values())) == 90 - 16
    assert planned_images(work) == 0


def test_newcomers_that_clip_more_than_the_many_are_taken_all_the_same(field: Path, tmp_path: Path) -> None:
    start(tmp_path / "x")
    coding = (
        "encode.quantization.range=sigma",
        "encode.quantization.sigma=1",
        "encode.quantization.granularity=scalar",
    )
    encode(work_on(field, tmp_path, *coding))
    for i in range(9):
        put(tmp_path / "x", f"train/a/new{i}.png", 900 + i)
    told = encode(work_on(field, tmp_path, *coding, "encode.quantization.max_clip_fraction=0"))
    assert told["info"]["rows"] == 45
    assert told["info"]["clip_fraction"] > 0


def test_an_image_retired_by_name_while_its_new_version_is_encoded_stays_away(field: Path, tmp_path: Path) -> None:
    start(tmp_path / "x")
    work = work_on(field, tmp_path)
    encode(work)
    put(tmp_path / "x", "train/a/000.png", 77)
    put(tmp_path / "x", "train/a/002.png", 78)
    todo = plan(work)
    retire(open_location(str(tmp_path / "s")), "train", ["train/a/000.png"])
    for group in todo.groups:
        encode_group(work, group, 400)
    finalise(work, todo)
    assert len(codes(tmp_path)) == 29
    assert ("train/a/000.png", 0) not in codes(tmp_path)
    assert planned_images(work) == 0


def test_one_bad_newcomer_does_not_stop_the_others(field: Path, tmp_path: Path) -> None:
    start(tmp_path / "x")
    work = work_on(field, tmp_path)
    encode(work)
    (tmp_path / "x" / "train/a/broken.png").write_bytes(b"no picture")
    told = encode(work)
    assert [each["key"] for each in told["bad_inputs"]] == ["train/a/broken.png"]
    assert planned_images(work) == 0


def test_a_changed_image_changes_with_all_its_augmentations(field: Path, tmp_path: Path) -> None:
    start(tmp_path / "x", 8)
    work = work_on(field, tmp_path, "encode.augmentation.count=2", "encode.augmentation.padding=1")
    encode(work)
    before = codes(tmp_path)
    assert len(before) == 24
    put(tmp_path / "x", "train/a/000.png", 123)
    assert planned_images(work) == 3
    encode(work)
    after = codes(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {("train/a/000.png", n) for n in range(3)}


def test_an_encoding_that_was_interrupted_before_its_commit_goes_on(field: Path, tmp_path: Path) -> None:
    start(tmp_path / "x")
    work = work_on(field, tmp_path)
    encode(work)
    put(tmp_path / "x", "train/a/new.png", 77)
    first = plan(work)
    assert plan(work) == first
    assert Fragment.load(open_location(str(tmp_path / "s")), first.fragments[0]).plan.rows == 1
    encode(work)
    assert len(codes(tmp_path)) == 31


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 3)), max_size=4), min_size=1, max_size=3))
def test_after_any_changes_the_functaset_holds_exactly_what_the_source_holds(
    field: Path, tmp_path_factory: pytest.TempPathFactory, rounds: list[list[tuple[int, int]]]
) -> None:
    """(image, state): state 0 is that it is gone, others are its content."""
    tmp_path = tmp_path_factory.mktemp("any")
    start(tmp_path / "x", 8)
    work = work_on(field, tmp_path, "images.max_gone_fraction=1")
    encode(work)
    states = dict.fromkeys(range(8), -1)
    for changes in rounds:
        for image, state in changes:
            name = f"train/{'ab'[image % 2]}/{image:03d}.png"
            (tmp_path / "x" / name).unlink(missing_ok=True)
            if state:
                put(tmp_path / "x", name, 100 * state + image)
            states[image] = state
        if not any(states.values()):
            put(tmp_path / "x", "train/a/000.png", 100)
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


@pytest.mark.parametrize("lost", ["train/a", "train/b", "all of train/a but one"])
def test_many_images_that_are_gone_end_an_encoding_before_it_changes_anything(
    field: Path, tmp_path: Path, lost: str
) -> None:
    """A share that is not mounted looks like an empty folder, or like none."""
    start(tmp_path / "x")
    work = work_on(field, tmp_path)
    encode(work)
    before = bytes_of(tmp_path / "s")
    folder = tmp_path / "x" / ("train/a" if "but" in lost else lost)
    gone = sorted(folder.iterdir())["but" in lost :]
    aside = tmp_path / "aside"
    aside.mkdir()
    for path in gone:
        path.rename(aside / path.name)
    with pytest.raises(StorageError, match=rf"x: {len(gone)} of 36 encoded images are no .*--retire-lost") as error:
        plan(work)
    assert "\n" not in str(error.value)
    assert bytes_of(tmp_path / "s") == before
    for path in gone:
        (aside / path.name).rename(path)
    assert planned_images(work) == 0
    for path in gone:
        path.unlink()
    told = encode(work.model_copy(update={"retire_lost": True}))
    assert told["info"]["rows"] == 36 - len(gone)
    assert planned_images(work) == 0


def test_a_class_that_is_gone_is_asked_about_however_small_it_is(field: Path, tmp_path: Path) -> None:
    start(tmp_path / "x")
    put(tmp_path / "x", "train/0/one.png", 55)
    put(tmp_path / "x", "test/0/one.png", 56)
    work = work_on(field, tmp_path)
    encode(work)
    (tmp_path / "x/train/0/one.png").unlink()  # without it every label is another
    with pytest.raises(StorageError, match=r"1 of 38 .*train/0/one\.png\), all of a class of split 'train' among them"):
        plan(work)
    told = encode(work.model_copy(update={"retire_lost": True}))
    assert told["info"]["rows_by_split"] == {"train": 30, "test": 7}


def test_images_that_moved_to_the_other_split_or_over_the_limit_are_not_gone(field: Path, tmp_path: Path) -> None:
    start(tmp_path / "x")
    work = work_on(field, tmp_path, "images.limit=12")
    encode(work)
    for i in range(12):  # they come first in their classes, and the limit leaves others out
        put(tmp_path / "x", f"train/{'ab'[i % 2]}/+{i:03d}.png", 700 + i)
    told = encode(work)
    assert told["info"]["rows_by_split"] == {"train": 12, "test": 6}
    assert all("+" in key for key, _ in codes(tmp_path))
    for i in range(40):
        put(tmp_path / "y" / "x", f"{'ab'[i % 2]}/{i:03d}.png", i)
    border = work_on(field, tmp_path / "y", "images.test_fraction=0.5")
    encode(border)
    for i in range(40, 90):
        put(tmp_path / "y" / "x", f"{'ab'[i % 2]}/{i:03d}.png", i)
    assert encode(border)["info"]["rows"] == 90


@pytest.mark.parametrize("what", ["the folder", "all images", "train"])
def test_a_source_that_is_gone_retires_nothing(field: Path, tmp_path: Path, what: str) -> None:
    start(tmp_path / "x")
    work = work_on(field, tmp_path)
    encode(work)
    before = bytes_of(tmp_path / "s")
    where = {"the folder": "x", "all images": "x/*", "train": "x/train"}[what]
    for path in sorted(tmp_path.glob(where)):
        path.rename(tmp_path / f"away-{path.name}")
    for lost in (False, True):  # nobody means to retire everything
        with pytest.raises(StorageError, match=r"x: .*;"):
            plan(work.model_copy(update={"retire_lost": lost}))
    assert bytes_of(tmp_path / "s") == before


def test_a_renamed_file_is_another_image_of_the_same_pixels(field: Path, tmp_path: Path) -> None:
    start(tmp_path / "x")
    work = work_on(field, tmp_path)
    encode(work)
    before = codes(tmp_path)
    (tmp_path / "x/train/a/000.png").rename(tmp_path / "x/train/a/named otherwise.png")
    assert planned_images(work) == 1
    encode(work)
    after = codes(tmp_path)
    assert after.keys() ^ before.keys() == {("train/a/000.png", 0), ("train/a/named otherwise.png", 0)}
    assert after["train/a/named otherwise.png", 0] == before["train/a/000.png", 0]


def test_an_image_moved_to_another_class_or_to_the_test_split_leaves_its_old_place(field: Path, tmp_path: Path) -> None:
    start(tmp_path / "x")
    work = work_on(field, tmp_path)
    encode(work)
    (tmp_path / "x/train/a/000.png").rename(tmp_path / "x/train/b/000.png")
    (tmp_path / "x/train/a/002.png").rename(tmp_path / "x/test/a/moved.png")
    assert planned_images(work) == 2
    told = encode(work)
    assert told["info"]["rows_by_split"] == {"train": 29, "test": 7}
    train, test = (Functaset.open(str(tmp_path / "s")).load(split) for split in ("train", "test"))
    assert train.labels[train.keys.index("train/b/000.png")] == 1
    assert "test/a/moved.png" in test.keys
    assert not {"train/a/000.png", "train/a/002.png"} & {*train.keys, *test.keys}


def test_an_encoding_that_was_killed_after_its_commit_has_nothing_left_to_do(field: Path, tmp_path: Path) -> None:
    start(tmp_path / "x")
    work = work_on(field, tmp_path)
    encode(work)
    put(tmp_path / "x", "train/a/new.png", 77)
    first = encode(work)  # committed; its caller never wrote down that it was done
    before = bytes_of(tmp_path / "s")
    assert plan(work).groups == ()
    assert encode(work) == first
    assert bytes_of(tmp_path / "s") == before


def test_a_test_image_that_is_another_by_now_is_not_compared_with_its_old_latent(field: Path, tmp_path: Path) -> None:
    start(tmp_path / "x")
    work = work_on(field, tmp_path)
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
    put(tmp_path / "x", "test/a/000.png", 99)
    with pytest.raises(StorageError, match=r"0 of 6 test images .*, 1 changed: restore them, or encode again"):
        measure()
    (tmp_path / "x/test/a/000.png").unlink()
    with pytest.raises(StorageError, match=r"1 of 6 test images .* no longer there or readable, 0 changed"):
        measure()
    encode(work)
    assert measure() != before


def held(tmp_path: Path) -> dict[str, tuple[bytes, int]]:
    """key -> sha256 of the image and label, of every training row that is shown."""
    store = Functaset.open(str(tmp_path / "s"))
    found = {}
    for shard in store.shards("train"):
        digests, labels, keys = shard.array("source_sha256"), shard.array("label"), shard.table().keys
        for row in shard.rows:
            found[keys[row]] = bytes(digests[row]), int(labels[row])
    return found
