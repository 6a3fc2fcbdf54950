"""Folders of images: what is read, what is left out and named, and what is refused since it could mean two things."""

import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from functa.storage.config import ImagesConfig
from functa.storage.errors import StorageError
from functa.storage.images.source import Images, open_images
from functa.tasks.inference.png import prepare_folder
from tests.helpers.storage.image_files import class_folders


def opened(path: Path) -> Images:
    return open_images(ImagesConfig(source="folder", location=str(path)))


def counts(path: Path) -> dict[str, list[int]]:
    """Return the images of each class, by split."""
    images = opened(path)
    return {
        name: np.bincount(split.labels, minlength=len(images.classes)).tolist() for name, split in images.splits.items()
    }


# --- links

TWICE = "links list a folder's images twice, so that training images can be test images too"


def test_a_class_that_is_a_link_to_another_folder_empties_neither(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", per_class=6)
    class_folders(tmp_path / "test", per_class=2, classes=("dog",))
    os.symlink("../train/cat", tmp_path / "test/cat")
    assert counts(tmp_path) == {"train": [6, 6], "test": [6, 2]}
    assert opened(tmp_path).notes == (f"{tmp_path}: {TWICE}: test/cat = train/cat",)


def test_two_classes_may_link_to_one_folder(tmp_path: Path) -> None:
    class_folders(tmp_path / "elsewhere", per_class=6, classes=("cat",))
    (tmp_path / "data").mkdir()
    for name in ("first", "second"):
        os.symlink(tmp_path / "elsewhere/cat", tmp_path / "data" / name)
    assert {split: sum(each) for split, each in counts(tmp_path / "data").items()} == {"train": 10, "test": 2}
    assert opened(tmp_path / "data").notes[0].endswith(f"{TWICE}: first = second")


def test_a_class_that_is_a_link_to_a_folder_elsewhere_is_listed_once_and_needs_no_note(tmp_path: Path) -> None:
    class_folders(tmp_path / "elsewhere", per_class=30, classes=("cat",))
    class_folders(tmp_path / "data", per_class=30, classes=("dog",))
    os.symlink(tmp_path / "elsewhere/cat", tmp_path / "data/cat")
    assert opened(tmp_path / "data").notes == ()


def test_folders_below_a_link_are_named_too(tmp_path: Path) -> None:
    class_folders(tmp_path / "cat", per_class=15, classes=("kitten", "old"))
    os.symlink("cat", tmp_path / "felis")
    assert opened(tmp_path).notes[0].endswith(f"{TWICE}: cat/kitten = felis/kitten, cat/old = felis/old")


def test_a_link_to_a_folder_above_ends_the_listing_there(tmp_path: Path) -> None:
    class_folders(tmp_path, per_class=4)
    os.symlink(tmp_path, tmp_path / "cat/again")
    os.symlink(".", tmp_path / "dog/itself")
    assert sum(map(sum, counts(tmp_path).values())) == 8


def test_folders_that_link_to_each_other_are_refused_in_one_line(tmp_path: Path) -> None:
    names = [f"class{number}" for number in range(8)]
    class_folders(tmp_path, per_class=2, classes=tuple(names))
    for one in names:
        for other in names:
            os.symlink(tmp_path / other, tmp_path / one / f"to-{other}")
    with pytest.raises(StorageError, match="links to folders inside each other; take links out") as refused:
        opened(tmp_path)
    assert "\n" not in str(refused.value)


# --- splits and classes that are guessed


def two_splits(train: str, test: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        class_folders(path / train, per_class=4)
        class_folders(path / test, per_class=2)

    return make


def classes_of(train: tuple[str, ...], test: tuple[str, ...]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        class_folders(path / "train", per_class=4, classes=train)
        class_folders(path / "test", per_class=2, classes=test)

    return make


def flat(*classes: str) -> Callable[[Path], None]:
    return lambda path: class_folders(path, per_class=30, classes=classes)


COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))

REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "Train and Test": (two_splits("Train", "Test"), "has Test and Train; expected train/CLASS/\\* and test/CLASS/\\*"),
    "TRAIN and test": (two_splits("TRAIN", "test"), "has TRAIN and test; expected"),
    "train and dev": (two_splits("train", "dev"), "has dev and train; expected"),
    "train, test and val": (
        lambda path: (two_splits("train", "test")(path), class_folders(path / "val", per_class=1), None)[-1],
        "has test and train and val; .*name the two that count, as in .../{train,val}",
    ),
    "training and validation": (two_splits("training", "validation"), "has training and validation; expected"),
    "one level down": (two_splits("data/train", "data/test"), "te?\\w+ is one level down, in data; .*/data\\)"),
    "case between splits": (classes_of(("cat", "dog"), ("Cat", "dog")), "'Cat' and 'cat' differ only in case"),
    "case between classes": (flat("Cat", "cat"), "'Cat' and 'cat' differ only in case, blanks or Unicode form"),
    "blanks": (flat("red fox", "red  fox"), "differ only in case, blanks"),
    "Unicode forms": (flat(COMPOSED, DECOMPOSED), "differ only in case, blanks or Unicode form"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_a_layout_that_could_mean_two_things_is_refused_with_the_names(
    make: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    make(tmp_path)
    with pytest.raises(StorageError, match=message) as refused:
        opened(tmp_path)
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


READ: dict[str, Callable[[Path], None]] = {
    "a class called evaluation": flat("cat", "evaluation"),
    "a class called valid among others": flat("cat", "valid"),
    "one class": flat("all"),
    "classes that begin alike": flat("train station", "trains"),
}


@pytest.mark.parametrize("make", READ.values(), ids=READ)
def test_other_names_are_classes(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path)
    assert opened(tmp_path).notes == ()


def test_classes_without_test_images_are_named(tmp_path: Path) -> None:
    classes_of(("ant", "bee", "cow", "dog", "eel"), ("ant",))(tmp_path)
    assert opened(tmp_path).notes == (f"{tmp_path}: 4 classes have no test image: bee, cow, dog and 1 more",)


def test_classes_without_training_images_are_named(tmp_path: Path) -> None:
    classes_of(("cat",), ("cat", "dog", "eel"))(tmp_path)
    assert opened(tmp_path).notes == (
        f"{tmp_path}: no model can know dog, eel: test has such images, and train has none",
    )


# --- files that are left out


def test_known_aliases_are_read_and_other_files_counted_by_ending(tmp_path: Path) -> None:
    class_folders(tmp_path, per_class=24)
    for number, file in enumerate(sorted((tmp_path / "dog").iterdir())):
        file.rename(file.with_suffix([".jfif", ".JPE", ".pjpeg", ".Apng"][number % 4]))
    assert sum(map(sum, counts(tmp_path).values())) == 48
    for name in ("a.heic", "b.HEIC", "notes.txt", "README", ".DS_Store"):
        (tmp_path / "cat" / name).write_bytes(b"x")
    counted = "2 .heic, 1 without an ending, 1 .txt"
    assert opened(tmp_path).notes == (f"{tmp_path}: left out 4 files that have no ending of an image: {counted}",)


def test_a_folder_of_an_unknown_format_names_it(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat/1.heic").write_bytes(b"x")
    with pytest.raises(StorageError, match=r"no images there.*; left out 1 files .*: 1 \.heic"):
        opened(tmp_path)


# --- what this project wrote


def as_root(path: Path) -> None:
    """Make a folder look like a run's root with the images of its report."""
    (path / "stages").mkdir(parents=True)
    (path / "stages/meta_train.json").write_text("{}")
    class_folders(path / "runs/1/images", per_class=2, classes=("report",))


def test_images_of_a_run_among_the_images_are_left_out_and_named(tmp_path: Path) -> None:
    class_folders(tmp_path, per_class=4)
    as_root(tmp_path / "functa-runs/digits")
    prepare_folder(tmp_path / "decoded")
    class_folders(tmp_path / "decoded", per_class=3, classes=("any",))
    images = opened(tmp_path)
    assert images.classes == ["cat", "dog"]
    expected = f"{tmp_path}: left out 5 images that this project wrote, in decoded, functa-runs/digits"
    assert images.notes == (expected,)


def test_the_root_of_a_run_is_no_folder_of_images(tmp_path: Path) -> None:
    as_root(tmp_path / "root")
    for folder in (tmp_path / "root/runs/1/images", tmp_path / "root/runs"):
        with pytest.raises(StorageError, match=f"lies in {tmp_path}/root, the root of a run"):
            opened(folder)
    class_folders(tmp_path / "root")
    with pytest.raises(StorageError, match="is the root of a run, or a folder that images were decoded to"):
        opened(tmp_path / "root")
