"""A zoo of folder layouts beside the reading that is expected of each: images per split and class, or the refusal."""

import os
from pathlib import Path

import pytest
from PIL import Image

from functa.storage.config import ImagesConfig
from functa.storage.errors import StorageError
from functa.storage.images.source import open_images
from tests.helpers.storage.image_files import encoded, noise

# What lies at a path: a number of images in that folder, a link's target, or a file's bytes. `+n`: a link to a folder
# of n images outside of the folder that is read.
Files = dict[str, int | str | bytes]

DEEP = "a/very/deep/tree/of/folders"
RECORD, MARK = "stages/meta_train.json", ".functa-output"
NOT_TEXT = b"caf\xe9".decode("utf-8", "surrogateescape")

# Layout, files, then "train: CLASS COUNT, ...; test: ...". A folder without train/ and test/ is split by the images'
# names, so the counts are those of the names 000.png, 001.png, ... whatever lies beside them.
READ: dict[str, tuple[Files, str]] = {
    "splits with classes": (
        {"train/cat": 4, "train/dog": 3, "test/cat": 2, "test/dog": 1}, "train: cat 4, dog 3; test: cat 2, dog 1",
    ),
    "classes alone": ({"cat": 30, "dog": 30}, "train: cat 24, dog 26; test: cat 6, dog 4"),
    "one class": ({"all": 30}, "train: all 24; test: all 6"),
    "classes of unequal size": ({"cat": 30, "dog": 12}, "train: cat 24, dog 9; test: cat 6, dog 3"),
    "a class without test images": (
        {"train/cat": 4, "train/dog": 4, "test/cat": 2}, "train: cat 4, dog 4; test: cat 2, dog 0",
    ),
    "a class without training images": (
        {"train/cat": 4, "test/cat": 2, "test/dog": 1}, "train: cat 4, dog 0; test: cat 2, dog 1",
    ),
    "folders below classes": ({"train/cat/2024/may": 3, "train/cat": 1, "test/cat/x": 2}, "train: cat 4; test: cat 2"),
    "deep folders": ({f"train/cat/{DEEP}": 3, f"test/cat/{DEEP}": 2}, "train: cat 3; test: cat 2"),
    "train and val": ({"train/cat": 4, "val/cat": 2}, "train: cat 4; test: cat 2"),
    "train and validation": ({"train/cat": 4, "validation/cat": 2}, "train: cat 4; test: cat 2"),
    "images without classes": ({".": 30}, "train: 27, no class; test: 3, no class"),
    "splits without classes": ({"train": 3, "test": 2}, "train: 3, no class; test: 2, no class"),
    "one folder above the classes": ({"data/cat": 12, "data/dog": 12}, "train: data 19; test: data 5"),
    "an empty class folder": ({"train/cat": 2, "test/cat": 1, "train/cow/": 0}, "train: cat 2; test: cat 1"),
    "a class of text files": ({"train/cat": 2, "test/cat": 1, "train/cow/a.txt": b"x"}, "train: cat 2; test: cat 1"),
    "names that are numbers": (
        {"0": 12, "1": 12, "10": 12, "2": 12}, "train: 0 11, 1 11, 10 11, 2 9; test: 0 1, 1 1, 10 1, 2 3",
    ),
    "names of other scripts": ({"Ελλη": 12, "cat": 12}, "train: cat 10, Ελλη 10; test: cat 2, Ελλη 2"),
    "names with signs": (
        {"[red]": 12, "<b>": 12, "a&b": 12},
        "train: <b> 8, [red] 11, a&b 11; test: <b> 4, [red] 1, a&b 1",
    ),
    "a name that is no text": ({f"train/{NOT_TEXT}": 2, f"test/{NOT_TEXT}": 1}, "train: caf\\xe9 2; test: caf\\xe9 1"),
    "a class named like an image": ({"x.png": 30, "cat": 30}, "train: cat 24, x.png 28; test: cat 6, x.png 2"),
    "a class called evaluation": (
        {"cat": 30, "evaluation": 30},
        "train: cat 24, evaluation 21; test: cat 6, evaluation 9",
    ),
    "a class called valid": ({"cat": 30, "valid": 30}, "train: cat 24, valid 25; test: cat 6, valid 5"),
    "classes that begin like splits": (
        {"train station": 30, "trains": 30}, "train: train station 27, trains 25; test: train station 3, trains 5",
    ),
    "classes called like splits below them": (
        {"train/train": 3, "train/test": 2, "test/train": 1, "test/test": 1},
        "train: test 2, train 3; test: test 1, train 1",
    ),
    "equal names in two classes": (
        {"train/cat/1.png": 0, "train/dog/1.png": 0, "test/cat/1.png": 0}, "train: cat 1, dog 1; test: cat 1, dog 0",
    ),
    "hidden folders": (
        {"train/cat": 2, "test/cat": 1, ".git/x": 5, "train/cat/.thumbnails": 3}, "train: cat 2; test: cat 1",
    ),
    "hidden files": ({"train/cat": 2, "test/cat": 1, "train/cat/._000.png": 0}, "train: cat 2; test: cat 1"),
    "a hidden split": ({"cat": 12, "dog": 12, ".test/cat": 4}, "train: cat 10, dog 9; test: cat 2, dog 3"),
    "capital endings": (
        {"train/cat/A.PNG": 0, "train/cat/B.Jpg": 0, "test/cat/C.JPEG": 0},
        "train: cat 2; test: cat 1",
    ),
    "aliases of endings": (
        {"train/cat/a.jfif": 0, "train/cat/b.pjpeg": 0, "train/cat/c.jpe": 0, "test/cat/d.apng": 0},
        "train: cat 3; test: cat 1",
    ),
    "other files beside": (
        {"train/cat": 2, "test/cat": 1, "labels.csv": b"x", "train/README": b"x", "train/cat/a.heic": b"x"},
        "train: cat 2; test: cat 1",
    ),
    "an empty image": ({"train/cat": 2, "train/cat/z.png": b"", "test/cat": 1}, "train: cat 3; test: cat 1"),
    "a class that is a link": (
        {"train/cat": 6, "train/dog": 6, "test/dog": 2, "test/cat": "../train/cat"},
        "train: cat 6, dog 6; test: cat 6, dog 2",
    ),
    "a class that is a link elsewhere": ({"train/cat": "+3", "test/cat": 1}, "train: cat 3; test: cat 1"),
    "splits that are links": ({"train": "+3/in", "test": "+2/in"}, "train: in 3; test: in 2"),
    "two classes that are one folder": (
        {"train/cat": 3, "train/chat": "cat", "test/cat": 1}, "train: cat 3, chat 3; test: cat 1, chat 0",
    ),
    "an image that is a link": (
        {"train/cat": 2, "train/cat/z.png": "000.png", "test/cat": 1},
        "train: cat 3; test: cat 1",
    ),
    "a broken link": ({"train/cat": 2, "train/cat/z.png": "none.png", "test/cat": 1}, "train: cat 2; test: cat 1"),
    "a link to itself": ({"train/cat": 2, "train/cat/z.png": "z.png", "test/cat": 1}, "train: cat 2; test: cat 1"),
    "a link to a folder above": ({"train/cat": 2, "train/cat/up": "../..", "test/cat": 1}, "train: cat 2; test: cat 1"),
    "a run's root among the classes": (
        {"cat": 12, "dog": 12, f"runs/{RECORD}": b"{}", "runs/report/images": 4},
        "train: cat 10, dog 9; test: cat 2, dog 3",
    ),
    "decoded images among the classes": (
        {"cat": 12, "dog": 12, f"out/{MARK}": b"", "out/samples": 4}, "train: cat 10, dog 9; test: cat 2, dog 3",
    ),
}  # fmt: skip

REFUSED: dict[str, tuple[Files, str]] = {
    "an empty folder": ({}, "no images there; expected images in it, CLASS/*, or train/CLASS/* and test/CLASS/*"),
    "text files alone": (
        {"cat/a.txt": b"x"},
        "no images there; expected .* left out 1 files .*: 1 .txt",
    ),
    "arrays alone": ({"a.npz": b"x"}, "no images .* .npz files are read with images.source=npz"),
    "hidden images alone": ({".cat": 4}, "no images there"),
    "few images without classes": ({".": 4}, "by their names none is a test image; set images.split_seed=1"),
    "an image beside the classes": ({"cat": 30, "x.png": 0}, "x.png: an image outside any class folder"),
    "an image beside the splits": (
        {"train/cat": 2, "test/cat": 1, "x.png": 0},
        "x.png: an image outside train/ and test/; move it",
    ),
    "an image in a split": (
        {"train/cat": 2, "train/x.png": 0, "test/cat": 1},
        "train/x.png: an image outside any class",
    ),
    "train alone": (
        {"train/cat": 4},
        "has train; expected train/CLASS/* and test/CLASS/* .or val/. alone, in this spelling",
    ),
    "test alone": ({"test/cat": 4}, "has test; expected train/CLASS/* and test/CLASS/* .or val/. alone"),
    "Train and Test": ({"Train/cat": 4, "Test/cat": 2}, "has Test and Train; expected .* in this spelling"),
    "TRAIN and test": ({"TRAIN/cat": 4, "test/cat": 2}, "has TRAIN and test; expected"),
    "a blank in train": ({"train /cat": 4, "test/cat": 2}, "has test and train ; expected"),
    "train and Val": ({"train/cat": 4, "Val/cat": 2}, "has Val and train; expected"),
    "train and testing": ({"train/cat": 4, "testing/cat": 2}, "has testing and train; expected"),
    "images beside the classes of a split": (
        {"train/cat": 2, "train": 1, "test/cat": 1},
        "train/000.png: an image outside any class folder, and others are in one; move it .*images.labels=none",
    ),
    "training and validation": ({"training/cat": 4, "validation/cat": 2}, "has training and validation; expected"),
    "three splits": ({"train/cat": 4, "val/cat": 2, "test/cat": 2}, "has test and train and val; expected"),
    "splits and something else": (
        {"train/cat": 4, "test/cat": 2, "extra/cat": 2},
        "has extra and test and train; expected",
    ),
    "splits one level down": (
        {"data/train/cat": 4, "data/test/cat": 2},
        "is one level down, in data; name that folder",
    ),
    "splits below the classes": (
        {"cat/train": 4, "cat/test": 2, "dog/train": 4},
        "has cat/te.*; expected .* the splits above",
    ),
    "case between splits": ({"train/cat": 4, "test/Cat": 2}, "classes 'Cat' and 'cat' differ only in case"),
    "case between classes": (
        {"Cat": 30, "cat": 30},
        "classes 'Cat' and 'cat' differ only in case, blanks or Unicode form",
    ),
    "blanks between classes": ({"red fox": 30, "red  fox": 30}, "'red  fox' and 'red fox' differ only in case, blanks"),
    "Unicode forms": ({"caf\u00e9": 30, "cafe\u0301": 30}, "differ only in case, blanks or Unicode form"),
    "wide letters": ({"cat": 30, "\uff43at": 30}, "differ only in case, blanks or Unicode form"),
    "no test image by name": ({"cat": 1, "dog": 1}, "by their names none is a test image; .* or make train/ and test/"),
    "a root": ({"cat": 4, RECORD: b"{}"}, "is the root of a run, or a folder that images were decoded to"),
    "a folder of decoded images": (
        {"cat": 4, MARK: b""},
        "is the root of a run, or a folder that images were decoded to",
    ),
    "images none of which is readable": (
        {"train/cat/a.png": b"x", "test/cat/b.png": b"x"},
        "not one image there is readable",
    ),
    "folders that link to each other": (
        {f"c{n}": 2 for n in range(8)} | {f"c{n}/to{m}": f"../c{m}" for n in range(8) for m in range(8)},
        "links to folders inside each other; take links out",
    ),
}  # fmt: skip


def build(folder: Path, files: Files) -> Path:
    """Make the layout; links last, so that what they lead to exists."""
    data = folder / "data"
    data.mkdir()
    for path, what in sorted(files.items(), key=lambda item: isinstance(item[1], str)):
        place = data / path
        place.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(what, bytes):
            place.write_bytes(what)
        elif isinstance(what, str):
            os.symlink(elsewhere(folder, what) if what.startswith("+") else what, place)
        elif Path(path).suffix and not what:
            place.write_bytes(image(0))
        else:
            fill(place, what)
    return data


def elsewhere(folder: Path, what: str) -> Path:
    count, _, below = what[1:].partition("/")
    outside = folder / f"outside-{count}"
    fill(outside / below, int(count))
    return outside


def fill(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number:03d}.png").write_bytes(image(number))


def image(seed: int) -> bytes:
    return encoded(Image.fromarray(noise(seed)))


def reading(data: Path) -> str:
    """Return the images of each class by split, in the words of the table."""
    images = open_images(ImagesConfig(source="folder", location=str(data)))
    splits = []
    for name, split in images.splits.items():
        labels = split.labels.tolist()
        counts = [f"{c} {labels.count(i)}" for i, c in enumerate(images.classes)] or [f"{len(split.keys)}, no class"]
        splits.append(f"{name}: {', '.join(counts)}")
    return "; ".join(splits)


@pytest.mark.parametrize(("files", "expected"), READ.values(), ids=READ)
def test_a_layout_is_read_as_the_table_lists_it(files: Files, expected: str, tmp_path: Path) -> None:
    assert reading(build(tmp_path, files)) == expected


@pytest.mark.parametrize(("files", "words"), REFUSED.values(), ids=REFUSED)
def test_a_layout_is_refused_in_the_words_of_the_table(files: Files, words: str, tmp_path: Path) -> None:
    data = build(tmp_path, files)
    with pytest.raises(StorageError, match=words.replace("/*", "/\\*")) as refused:
        reading(data)
    assert str(data) in str(refused.value) or "more images: by their names" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_folders_that_may_be_meant_as_classes_are_named(tmp_path: Path) -> None:
    data = build(tmp_path, {"data/cat": 12, "data/dog": 12})
    expected = f"{data}: one class, data; if its folders cat, dog are the classes, set images.location={data}/data"
    assert open_images(ImagesConfig(source="folder", location=str(data))).notes == (expected,)
