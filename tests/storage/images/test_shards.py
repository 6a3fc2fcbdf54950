"""Tars and tables of images: rows equal those of the same images as files, and what is wrong with a shard is named."""

import csv
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import ipc, parquet

from functa.storage.config import ImagesConfig
from functa.storage.errors import StorageError
from functa.storage.images.patterns import select
from functa.storage.images.source import Images, open_images
from tests.helpers.storage.image_files import encoded, noise

SAMPLES = [(f"{split}/{label}/{i:03d}", split, label, noise(1000 * label + i)) for split in ("train", "test")
           for label in (0, 1, 2) for i in range(4)]  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def png(pixels: np.ndarray) -> bytes:
    return encoded(Image.fromarray(pixels))


def write_tar(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> Path:
    """Write samples as WebDataset does: members of one name, one ending each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, parts in samples:
            for ending, data in parts.items():
                member = tarfile.TarInfo(f"{name}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def members_of(path: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(path) as tar:
        return tar.getmembers()


def cls(samples: list[Any]) -> list[tuple[str, dict[str, bytes]]]:
    return [(key.replace("/", "_"), {"png": png(x), "cls": str(label).encode()}) for key, _, label, x in samples]


def opened(location: object, source: str, **settings: Any) -> Images:
    return open_images(ImagesConfig(source=source, location=str(location), **settings))


def rows(images: Images, split: str) -> list[tuple[int, bytes]]:
    """Return label and pixels of each row, in an order that names do not decide."""
    part = images.split(split)
    batch = part.read(range(len(part)))
    assert batch.good.all(), batch.reasons
    return sorted((int(label), pixels.tobytes()) for label, pixels in zip(part.labels, batch.images))


def of(split: str) -> list[Any]:
    return [sample for sample in SAMPLES if sample[1] == split]


def expected(split: str) -> list[tuple[int, bytes]]:
    return sorted((label, pixels.tobytes()) for _, _, label, pixels in of(split))


def as_tars(folder: Path) -> Path:
    for split in ("train", "test"):
        for shard in range(3):
            write_tar(folder / f"set-{split}-{shard:06d}.tar", cls(of(split)[shard::3]))
    return folder


def as_folders(folder: Path, test: str) -> Path:
    for key, split, label, pixels in SAMPLES:
        path = folder / {"train": "train", "test": test}[split] / str(label) / f"{key[-3:]}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(pixels))
    return folder


def as_tables(folder: Path, names: bool = True) -> Path:
    """Write Parquet files as Hugging Face does, in groups of 3 rows."""
    folder.mkdir(parents=True)
    for split, file in (("train", "train"), ("test", "validation")):
        info = {"info": {"features": {"label": {"names": ["zero", "one", "two"], "_type": "ClassLabel"}}}}
        table = pyarrow.table(
            {
                "image": [{"bytes": png(pixels), "path": f"{i}.png"} for i, (*_, pixels) in enumerate(of(split))],
                "label": [label for _, _, label, _ in of(split)],
            }
        ).replace_schema_metadata({"huggingface": json.dumps(info)} if names else None)
        parquet.write_table(table, folder / f"{file}-00000-of-00001.parquet", row_group_size=3)
    return folder


def as_arrow(folder: Path) -> Path:
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        table = pyarrow.table(
            {"img": [png(x) for *_, x in of(split)], "label": [label for _, _, label, _ in of(split)]}
        )
        with ipc.new_stream(folder / split / "data-00000-of-00001.arrow", table.schema) as file:
            file.write_table(table, max_chunksize=5)
    return folder


def as_flat(folder: Path) -> Path:
    for key, split, _, pixels in SAMPLES:
        (folder / split).mkdir(parents=True, exist_ok=True)
        (folder / split / f"{key.replace('/', '_')}.png").write_bytes(png(pixels))
    with open(folder / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows((f"{s}/{key.replace('/', '_')}.png", label) for key, s, label, _ in SAMPLES)
    return folder


FORMS: dict[str, Callable[[Path], tuple[Path, str, dict[str, Any]]]] = {
    "train and test": lambda p: (as_folders(p / "d", "test"), "folder", {}),
    "train and val": lambda p: (as_folders(p / "d", "val"), "folder", {}),
    "train and validation": lambda p: (as_folders(p / "d", "validation"), "folder", {}),
    "a table of labels": lambda p: (as_flat(p / "d"), "folder", {"labels": str(p / "d/labels.csv")}),
    "tars": lambda p: (as_tars(p / "d"), "webdataset", {}),
    "tars by a pattern": lambda p: (as_tars(p / "d") / "set-{train,test}-{000000..000002}.tar", "webdataset", {}),
    "tars by a star": lambda p: (as_tars(p / "d") / "set-*.tar", "webdataset", {}),
    "Parquet with class names": lambda p: (as_tables(p / "d"), "parquet", {}),
    "Parquet with numbers": lambda p: (as_tables(p / "d", names=False), "parquet", {}),
    "Arrow": lambda p: (as_arrow(p / "d"), "parquet", {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_images_are_the_same_rows_in_every_form(form: str, tmp_path: Path) -> None:
    location, source, settings = FORMS[form](tmp_path)
    images = opened(location, source, **settings)
    assert len(images.classes) == 3
    assert (rows(images, "train"), rows(images, "test")) == (expected("train"), expected("test"))


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


def test_a_tar_that_ends_early_keeps_its_whole_images_and_is_named(tmp_path: Path) -> None:
    as_tars(tmp_path / "d")
    path = tmp_path / "d/set-train-000001.tar"
    labels_first = [(name, dict(reversed(parts.items()))) for name, parts in cls(of("train")[1::3])]
    whole = write_tar(path, labels_first).read_bytes()
    last = [member for member in members_of(path) if member.name.endswith(".png")][-1]
    for cut, images_left, bad in (
        (last.offset_data + 20, 4, 1),  # in an image
        (last.offset + 100, 3, 0),  # in a header
        (last.offset, 3, 0),  # between two members
    ):
        path.write_bytes(whole[:cut])
        images = opened(tmp_path / "d", "webdataset", resolution=8)
        split = images.split("train")
        mine = [i for i, key in enumerate(split.keys) if key.startswith("set-train-000001.tar/")]
        batch = split.read(mine)
        assert (len(mine), len(batch.reasons)) == (images_left, bad)
        assert all("ends before this image does" in reason for reason in batch.reasons.values())
        assert any("set-train-000001.tar: ends early" in note for note in images.notes)


def test_an_image_whose_label_was_cut_off_is_left_out(tmp_path: Path) -> None:
    as_tars(tmp_path / "d")
    path = tmp_path / "d/set-train-000001.tar"
    path.write_bytes(path.read_bytes()[: members_of(path)[-1].offset])
    images = opened(tmp_path / "d", "webdataset")
    assert len(images.split("train")) == 11
    assert any("its 3 images before that are read" in note for note in images.notes)


def test_a_damaged_header_in_a_tar_is_not_its_end(tmp_path: Path) -> None:
    as_tars(tmp_path / "d")
    path = tmp_path / "d/set-train-000001.tar"
    data = bytearray(path.read_bytes())
    third = members_of(path)[2].offset
    data[third : third + 512] = b"x" * 512
    path.write_bytes(data)
    images = opened(tmp_path / "d", "webdataset")
    assert any(f"damaged, at byte {third}" in note for note in images.notes)


def test_a_member_that_is_no_image_is_one_bad_row(tmp_path: Path) -> None:
    samples = cls(of("train"))
    samples[1][1]["png"] = b"<html>not found</html>"
    write_tar(tmp_path / "train.tar", samples)
    write_tar(tmp_path / "test.tar", cls(of("test")))
    split = opened(tmp_path, "webdataset", resolution=8).split("train")
    batch = split.read(range(len(split)))
    assert list(batch.reasons) == [1]
    assert "not an image of a known format" in batch.reasons[1]


def test_a_shard_that_is_replaced_after_the_listing_gives_bad_rows_never_other_pixels(tmp_path: Path) -> None:
    as_tars(tmp_path / "d")
    as_tables(tmp_path / "t")
    tars, tables = opened(tmp_path / "d", "webdataset"), opened(tmp_path / "t", "parquet")
    write_tar(tmp_path / "d/set-train-000000.tar", cls([(k, s, n, 255 - x) for k, s, n, x in of("train")[0::3]]))
    (tmp_path / "t/train-00000-of-00001.parquet").write_bytes(b"PAR1")
    batch = tars.split("train").read(range(12))
    assert (~batch.good).sum() == 4
    assert all("another tar than when it was listed" in reason for reason in batch.reasons.values())
    assert not tables.split("train").read(range(12)).good.any()


def spoilt(change: Callable[[Path], None], form: str) -> Callable[[Path], tuple[Path, str, dict[str, Any]]]:
    def make(path: Path) -> tuple[Path, str, dict[str, Any]]:
        found = FORMS[form](path)
        change(path / "d")
        return found

    return make


def _twice(folder: Path) -> None:
    write_tar(folder / "set-train-000000.tar", cls(of("train")[:1]) * 2)


def _no_label(folder: Path) -> None:
    write_tar(folder / "set-train-000000.tar", [("a", {"png": png(noise(1))})])


def _outside(folder: Path) -> None:
    write_tar(folder / "set-train-000000.tar", [("a", {"png": png(noise(1)), "cls": b"-1"})])


def _third_split(folder: Path) -> None:
    write_tar(folder / "set-val-000000.tar", cls(of("test")[:2]))


def _compressed(folder: Path) -> None:
    for path in folder.iterdir():
        path.rename(path.with_suffix(".tar.gz"))


def _gzip_inside(folder: Path) -> None:
    (folder / "set-train-000000.tar").write_bytes(b"\x1f\x8b" + bytes(2000))


def _no_columns(folder: Path) -> None:
    parquet.write_table(pyarrow.table({"x": [1, 2]}), folder / "train-00000-of-00001.parquet")


def _no_table(folder: Path) -> None:
    (folder / "train-00000-of-00001.parquet").write_bytes(b"PAR1 not really PAR1")


def _beyond_names(folder: Path) -> None:
    path = folder / "train-00000-of-00001.parquet"
    table = parquet.read_table(path)
    parquet.write_table(table.set_column(1, "label", pyarrow.array([7] * len(table))), path)


def _absent_file(folder: Path) -> None:
    with open(folder / "labels.csv", "a") as file:
        file.write("train/nowhere.png,1\n")


def _two_labels(folder: Path) -> None:
    with open(folder / "labels.csv", "a") as file:
        file.write("train/train_0_000.png,2\n")


def _short_row(folder: Path) -> None:
    with open(folder / "labels.csv", "a") as file:
        file.write("train/train_0_000.png\n")


def missing_shard(path: Path) -> tuple[Path, str, dict[str, Any]]:
    return as_tars(path / "d") / "set-train-{000000..000005}.tar", "webdataset", {}


REFUSED = {
    "a key twice": (spoilt(_twice, "tars"), "sample train_0_000 has two images"),
    "a label missing": (spoilt(_no_label, "tars"), "a has no label, and 20 images have one"),
    "a label below 0": (spoilt(_outside, "tars"), "label -1 is none of the classes"),
    "three splits": (spoilt(_third_split, "tars"), "has shards of test, train, val; .*{train,val}"),
    "compressed tars": (spoilt(_compressed, "tars"), "is compressed as a whole: unpack it to .tar"),
    "no tar": (spoilt(_gzip_inside, "tars"), "set-train-000000.tar: is no tar"),
    "a shard that a pattern names": (missing_shard, "set-train-000003.tar and 2 more: is missing"),
    "no such columns": (spoilt(_no_columns, "Parquet with numbers"), "has no column image.*images.columns=IMAGE,LABEL"),
    "no table": (spoilt(_no_table, "Parquet with numbers"), "is no table that can be read"),
    "a label beyond the names": (spoilt(_beyond_names, "Parquet with class names"), "label 7 is none of the classes 0"),
    "a file of the table of labels": (spoilt(_absent_file, "a table of labels"), "names train/nowhere.png, not there"),
    "two labels": (spoilt(_two_labels, "a table of labels"), "line 25: .* has label 2 here and 0 above"),
    "a row without a label": (spoilt(_short_row, "a table of labels"), "line 25: expected a file and a label"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_wrong_with_a_shard_or_table_is_one_line_with_its_name(fault: str, tmp_path: Path) -> None:
    make, message = REFUSED[fault]
    location, source, settings = make(tmp_path)
    with pytest.raises(StorageError, match=message) as refused:
        opened(location, source, **settings)
    assert "\n" not in str(refused.value)


def test_a_flat_folder_has_no_classes_and_the_user_is_informed(tmp_path: Path) -> None:
    (tmp_path / "pics").mkdir()
    for i in range(20):
        (tmp_path / "pics" / f"{i:02d}.png").write_bytes(png(noise(i)))
    images = opened(tmp_path / "pics", "folder", test_fraction=0.25)
    assert images.classes == []
    assert any("no class folders" in note for note in images.notes)
    assert sorted(images.split("train").keys + images.split("test").keys) == [f"{i:02d}.png" for i in range(20)]


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
    keys = images.split("train").keys + images.split("test").keys
    assert len(keys) == 12
    assert all(key.encode() for key in keys)
    assert all(images.split(split).read(range(len(images.split(split)))).good.all() for split in ("train", "test"))


def test_what_other_programs_keep_beside_shards_is_no_shard(tmp_path: Path) -> None:
    as_arrow(tmp_path / "d")
    for name in ("cache-0f3a.arrow", "indices.arrow", "._data-00000-of-00001.arrow"):
        shutil.copy(tmp_path / "d/train/data-00000-of-00001.arrow", tmp_path / "d/train" / name)
    assert rows(opened(tmp_path / "d", "parquet"), "train") == expected("train")


def test_a_tar_whose_header_leads_back_ends_there(tmp_path: Path) -> None:
    as_tars(tmp_path / "d")
    path = tmp_path / "d/set-train-000001.tar"
    data = bytearray(path.read_bytes())
    member = members_of(path)[3]
    header = data[member.offset : member.offset + 512]
    header[124:136] = b"\xff" * 4 + (2**64 - 512).to_bytes(8, "big")  # -512 bytes
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    data[member.offset : member.offset + 512] = header
    path.write_bytes(data)
    assert any("is damaged, at byte" in note for note in opened(tmp_path / "d", "webdataset").notes)


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("?", ["a/1.png"]), (".*", []), ("{a,bb}", ["a/1.png", "bb/2.png"]), ("{a,bb}/", ["a/1.png", "bb/2.png"]),
        ("b*", ["bb/2.png"]), ("*/{1..2}.png", ["a/1.png", "bb/2.png"]), ("{a,b?}/*.png", ["a/1.png", "bb/2.png"]),
        ("*.png", ["3.png"]),
    ],
)  # fmt: skip
def test_a_pattern_names_files_or_folders_of_its_own_depth(pattern: str, matched: list[str], tmp_path: Path) -> None:
    for key in ("a/1.png", "bb/2.png", "3.png"):
        (tmp_path / key).parent.mkdir(exist_ok=True)
        (tmp_path / key).write_bytes(b"x")
    assert [entry.key for entry in select(f"{tmp_path}/{pattern}")[1]] == matched


def test_labels_beyond_any_number_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "train.tar", [("a", {"png": png(noise(1)), "cls": b"18446744073709551615"})])
    write_tar(tmp_path / "test.tar", [("a", {"png": png(noise(1)), "cls": b"1"})])
    images = opened(tmp_path, "webdataset")
    assert images.classes == ["1", "18446744073709551615"], "a name, as it is no number of a class"
