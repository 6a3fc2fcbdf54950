"""Tars and tables of images: rows equal those of the same images as files."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from functa.storage.config import ImagesConfig
from functa.storage.errors import StorageError
from functa.storage.images.shards import open_parts
from functa.storage.images.source import open_images, open_keys
from functa.storage.places import local
from functa.storage.places.address import open_location
from functa.storage.places.location import Location
from tests.helpers.storage.image_files import noise
from tests.helpers.storage.image_shards import (
    FORMS,
    SAMPLES,
    as_arrow,
    as_tables,
    as_tars,
    cls,
    expected,
    of,
    opened,
    png,
    rows,
    write_tar,
)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_images_are_the_same_rows_in_every_form(form: str, tmp_path: Path) -> None:
    location, source, settings = FORMS[form](tmp_path)
    images = opened(location, source, **settings)
    assert len(images.classes) == 3
    assert (rows(images, "train"), rows(images, "test")) == (expected("train"), expected("test"))


@pytest.mark.parametrize("form", FORMS)
def test_images_are_read_by_their_keys_without_a_listing(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    location, source, settings = FORMS[form](tmp_path)
    config = ImagesConfig(source=source, location=str(location), **settings)
    images = open_images(config)
    monkeypatch.setattr(local, "_walk", None)
    keys = [key for split in images.splits.values() for key in reversed(split.keys)]
    read = open_keys(config, (images.resolution, images.resolution, images.channels))([*keys, "no/such.png"])
    batch = read.read(range(len(keys) + 1))
    assert (batch.tokens[:-1], batch.reasons) == (
        [token for split in images.splits.values() for token in reversed(split.tokens)], {len(keys): "no longer there"},
    )  # fmt: skip
    pixels = [split.read(range(len(split))).images[::-1] for split in images.splits.values()]
    np.testing.assert_array_equal(batch.images[:-1], np.concatenate(pixels))


def test_class_names_come_from_the_tables_metadata(tmp_path: Path) -> None:
    assert opened(as_tables(tmp_path / "d"), "parquet").classes == ["zero", "one", "two"]
    assert opened(as_tables(tmp_path / "e", names=False), "parquet").classes == ["0", "1", "2"]


def test_shards_without_a_split_in_their_names_are_split_by_key(tmp_path: Path) -> None:
    for shard in range(4):
        write_tar(tmp_path / f"d/{shard:06d}.tar", cls([s for s in SAMPLES if s[1] == "train"][shard::4]))
    images = opened(tmp_path / "d", "webdataset", test_fraction=0.3, split_seed=4)
    assert len(images.split("train")) + len(images.split("test")) == 12
    assert not {*images.split("train").keys} & {*images.split("test").keys}


def test_another_tar_changes_no_other_images_key_or_token(tmp_path: Path) -> None:
    as_tars(tmp_path / "d")
    before = opened(tmp_path / "d", "webdataset").split("train")
    new = [(f"new_{i}", "train", 1, noise(7000 + i)) for i in range(3)]
    write_tar(tmp_path / "d/set-train-000003.tar", cls(new))
    after = opened(tmp_path / "d", "webdataset").split("train")
    known = dict(zip(before.keys, before.tokens))
    added = {key: token for key, token in zip(after.keys, after.tokens) if key not in known}
    assert {key: token for key, token in zip(after.keys, after.tokens) if key in known} == known
    assert sorted(added) == [f"set-train-000003.tar/new_{i}" for i in range(3)]


def test_labels_may_be_a_field_of_the_json_and_captions_are_left_alone(tmp_path: Path) -> None:
    samples = [
        (key.replace("/", "_"), {"png": png(x), "json": json.dumps({"kind": f"k{n}"}).encode(), "txt": b"a caption"})
        for key, _, n, x in SAMPLES
    ]
    write_tar(tmp_path / "train.tar", samples[:12])
    write_tar(tmp_path / "val.tar", samples[12:])
    images = opened(tmp_path, "webdataset", columns="png,kind")
    assert images.classes == ["k0", "k1", "k2"]
    unlabelled = opened(tmp_path, "webdataset")
    assert unlabelled.classes == []
    assert any("no labels" in note for note in unlabelled.notes)


def test_a_tar_is_indexed_once_for_each_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a worker that may read nothing but its roots and images."""
    monkeypatch.setenv("FUNCTA_ALLOWED_ROOTS", str(tmp_path / "d"))
    as_tars(tmp_path / "d")
    first = opened(tmp_path / "d", "webdataset")
    from functa.storage.images import tars

    def never(*_: object) -> Any:
        raise AssertionError("indexed again")

    with monkeypatch.context() as patch:
        patch.setattr(tars, "index_tar", never)
        assert opened(tmp_path / "d", "webdataset").split("train").keys == first.split("train").keys
    for cached in (tmp_path / "cache/functa/tars").iterdir():
        cached.write_text("[[[1]]")
    assert opened(tmp_path / "d", "webdataset").split("train").keys == first.split("train").keys


def test_a_flat_folder_has_no_classes_and_the_user_is_informed(tmp_path: Path) -> None:
    (tmp_path / "pics").mkdir()
    for i in range(20):
        (tmp_path / "pics" / f"{i:02d}.png").write_bytes(png(noise(i)))
    images = opened(tmp_path / "pics", "folder", test_fraction=0.25)
    assert images.classes == []
    assert any("no class folders" in note for note in images.notes)
    assert sorted([*images.split("train").keys, *images.split("test").keys]) == [f"{i:02d}.png" for i in range(20)]


def test_images_without_classes_may_lie_in_any_folders_if_the_config_declares_it(tmp_path: Path) -> None:
    for key in ("a/b/0.png", "a/1.png", "2.png", "c/3.png", "c/4.png", "5.png"):
        (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / key).write_bytes(png(noise(len(key))))
    with pytest.raises(StorageError, match=r"outside any class folder.*images.labels=none"):
        opened(tmp_path, "folder")
    images = opened(tmp_path, "folder", labels="none", test_fraction=0.4)
    assert images.classes == []
    assert len(images.split("train")) + len(images.split("test")) == 6


def test_arrays_without_labels_have_no_classes_and_both_splits_agree_about_it(tmp_path: Path) -> None:
    images = np.stack([noise(i) for i in range(6)])
    np.savez(tmp_path / "train.npz", images=images)
    np.savez(tmp_path / "test.npz", images=images[:2])
    assert opened(tmp_path, "npz").classes == []
    np.savez(tmp_path / "test.npz", images=images[:2], labels=[0, 1])
    with pytest.raises(StorageError, match=r"train\.npz: has no labels, and test\.npz has"):
        opened(tmp_path, "npz")


def test_a_field_of_the_json_counts_where_it_is_named_and_the_cls_elsewhere(tmp_path: Path) -> None:
    def with_all(samples: list[Any], json_first: bool) -> list[tuple[str, dict[str, bytes]]]:
        parts = []
        for key, _, n, x in samples:
            labels = {"cls": str(n).encode(), "json": json.dumps({"label": 7, "fine": f"f{n}"}).encode()}
            labels = dict(reversed(labels.items())) if json_first else labels
            parts.append((key.replace("/", "_"), {"png": png(x), "seg.png": png(255 - x), **labels}))
        return parts

    for json_first in (False, True):
        folder = tmp_path / str(json_first)
        for split in ("train", "test"):
            write_tar(folder / f"{split}.tar", with_all(of(split), json_first))
        assert rows(opened(folder, "webdataset"), "train") == expected("train")
        assert opened(folder, "webdataset", columns="png,fine").classes == ["f0", "f1", "f2"]
        assert opened(folder, "webdataset", columns="png,label").classes == [str(i) for i in range(8)]


def test_of_two_images_of_a_sample_the_named_one_is_read(tmp_path: Path) -> None:
    for split in ("train", "test"):
        both = [
            (key.replace("/", "_"), {"png": png(x), "bmp": b"none", "json": b'{"label": 1}'})
            for key, _, _, x in of(split)
        ]
        write_tar(tmp_path / f"{split}.tar", both)
    with pytest.raises(StorageError, match=r"has two images; name one by images\.columns"):
        opened(tmp_path, "webdataset")
    assert len(rows(opened(tmp_path, "webdataset", columns="png,label"), "train")) == 12


def test_one_shard_a_colon_in_its_path_and_names_that_are_no_text_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "2024-05-01T00:00"
    table = as_tables(tmp_path / "t") / "train-00000-of-00001.parquet"
    one = opened(table, "parquet", test_fraction=0.4)
    assert len(one.split("train")) + len(one.split("test")) == 12
    for number in range(3):
        write_tar(folder / f"{number}.tar", cls(of("train")[number::3]))
    os.rename(folder / "2.tar", os.fsencode(folder) + b"/caf\xe9.tar")
    images = opened(folder, "webdataset", test_fraction=0.4, split_seed=1)
    keys = [*images.split("train").keys, *images.split("test").keys]
    assert len(keys) == 12
    assert all(key.encode() for key in keys)
    assert all(images.split(split).read(range(len(images.split(split)))).good.all() for split in ("train", "test"))


def test_what_other_programs_keep_beside_shards_is_no_shard(tmp_path: Path) -> None:
    as_arrow(tmp_path / "d")
    for name in ("cache-0f3a.arrow", "indices.arrow", "._data-00000-of-00001.arrow"):
        shutil.copy(tmp_path / "d/train/data-00000-of-00001.arrow", tmp_path / "d/train" / name)
    assert rows(opened(tmp_path / "d", "parquet"), "train") == expected("train")


def test_labels_beyond_any_number_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "train.tar", [("a", {"png": png(noise(1)), "cls": b"18446744073709551615"})])
    write_tar(tmp_path / "test.tar", [("a", {"png": png(noise(1)), "cls": b"1"})])
    images = opened(tmp_path, "webdataset")
    assert images.classes == ["1", "18446744073709551615"], "a name, as it is no number of a class"


@pytest.mark.parametrize("form", ["tars", "folders", "a table of labels"])
def test_classes_of_one_split_alone_are_named_in_every_form(form: str, tmp_path: Path) -> None:
    ours = [s for s in SAMPLES if s[2] != {"train": 2, "test": 0}[s[1]]]
    settings: dict[str, Any] = {}
    if form == "tars":
        for split in ("train", "test"):
            write_tar(tmp_path / f"{split}.tar", cls([s for s in ours if s[1] == split]))
    for key, split, label, pixels in ours if form != "tars" else []:
        path = tmp_path / split / (f"{label}/{key[-3:]}.png" if form == "folders" else f"{key.replace('/', '_')}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(pixels))
    if form == "a table of labels":
        lines = [f"{split}/{key.replace('/', '_')}.png,{label}\n" for key, split, label, _ in ours]
        (tmp_path / "labels.csv").write_text("".join(lines))
        settings = {"labels": f"{tmp_path}/labels.csv"}
    source = "webdataset" if form == "tars" else "folder"
    assert opened(tmp_path, source, **settings).notes == (
        f"{tmp_path}: no model can know 2: test has such images, and train has none",
        f"{tmp_path}: 1 classes have no test image: 0",
    )


def test_a_file_in_parts_is_read_as_the_file_itself_in_few_requests(tmp_path: Path) -> None:
    data = bytes(range(256)) * 40
    (tmp_path / "file").write_bytes(data)
    location = open_location(str(tmp_path))
    entry = location.entry("file")
    assert entry is not None
    counted = CountedReads(location)
    with open_parts(counted, entry, block=4096) as file:  # type: ignore[arg-type]
        assert (file.read(10), file.seek(-6, 2), file.read(), file.read(1)) == (
            data[:10],
            len(data) - 6,
            data[-6:],
            b"",
        )
        assert (file.seek(5000), file.read(6000), file.tell()) == (5000, data[5000:], len(data))
    assert len(counted.parts) <= 4


class CountedReads:
    def __init__(self, location: Location) -> None:
        self.location, self.parts = location, list[tuple[int, int]]()

    def read_part(self, key: str, start: int, length: int) -> bytes:
        self.parts.append((start, length))
        return self.location.read_part(key, start, length)
