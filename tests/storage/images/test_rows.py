"""The split by key: an image never changes sides, whatever else is added, deleted or renamed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from functa.storage.config import ImagesConfig
from functa.storage.errors import StorageError
from functa.storage.images.rows import Rows, by_key, split_rows

NAMES = st.text("abc123/._ -", min_size=1, max_size=12)


def rows_of(keys: list[str], labels: list[int]) -> Rows:
    return Rows(keys, np.array(labels, np.int32), [""] * len(keys), keys)


def split(keys: list[str], labels: list[int], **changes: object) -> tuple[Rows, Rows]:
    config = ImagesConfig.model_validate({"source": "folder", "location": "x"} | changes)
    return split_rows(rows_of(keys, labels), config)


@settings(deadline=None)
@given(st.lists(st.sets(NAMES, min_size=1), min_size=2, max_size=6), st.floats(0.05, 0.9), st.integers(0, 5))
def test_no_image_is_ever_in_both_splits(listings: list[set[str]], fraction: float, seed: int) -> None:
    """Over any sequence of additions, deletions and renames: each listing follows the one before."""
    trained: set[str] = set()
    tested: set[str] = set()
    for listing in listings:
        keys = sorted(listing)
        held_out = by_key(keys, fraction, seed)
        tested |= {key for key, held in zip(keys, held_out) if held}
        trained |= {key for key, held in zip(keys, held_out) if not held}
    assert not trained & tested


def test_the_share_that_is_held_out_is_about_the_fraction() -> None:
    keys = [f"cat/{number:05d}.png" for number in range(20_000)]
    for seed in range(3):
        assert abs(by_key(keys, 0.1, seed).mean() - 0.1) < 0.01
    assert (by_key(keys, 0.1, 0) != by_key(keys, 0.1, 1)).any()


def test_few_images_are_refused_with_a_seed_that_splits_them() -> None:
    keys = [f"all/{number}.png" for number in range(4)]
    seeds = [seed for seed in range(50) if not by_key(keys, 0.1, seed).any()]
    with pytest.raises(StorageError, match=r"none is a test image; set images\.split_seed=") as refused:
        split(keys, [0] * 4, test_fraction=0.1, split_seed=seeds[0])
    assert "\n" not in str(refused.value)
    advised = int(str(refused.value).partition("split_seed=")[2].partition(",")[0])
    train, test = split(keys, [0] * 4, test_fraction=0.1, split_seed=advised)
    assert len(test.keys) >= 1
    assert len(train.keys) + len(test.keys) == 4


def test_images_that_no_seed_splits_are_refused_with_other_ways_out() -> None:
    with pytest.raises(StorageError, match=r"none is a test image; add images to small classes, set images\.split="):
        split(["all/1.png", "all/2.png"], [0, 0], test_fraction=1e-9)


def test_a_class_of_test_images_alone_is_refused() -> None:
    keys = [f"{name}/{number}.png" for name in "ab" for number in range(3)]
    labels = [0, 0, 0, 1, 1, 1]
    seed = next(
        seed for seed in range(500) if by_key(keys, 0.5, seed)[3:].all() and not by_key(keys, 0.5, seed)[:3].all()
    )
    with pytest.raises(StorageError, match=r"all images of 1 classes are test images; set images\.split_seed="):
        split(keys, labels, test_fraction=0.5, split_seed=seed)


def test_the_split_of_older_versions_can_be_chosen() -> None:
    keys = [f"{name}/{number:02d}.png" for name in "ab" for number in range(12)]
    train, test = split(keys, [0] * 12 + [1] * 12, test_fraction=0.25, split="stratified")
    assert np.bincount(test.labels).tolist() == [3, 3]
    assert np.bincount(train.labels).tolist() == [9, 9]
