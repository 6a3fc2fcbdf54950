"""Shards and tables with a fault: it is named in one line, and what is whole is read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from functa.storage.errors import StorageError
from tests.helpers.storage.image_files import noise
from tests.helpers.storage.image_shards import FORMS, as_tables, as_tars, cls, members_of, of, opened, png, write_tar


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


def test_samples_without_an_image_that_is_read_are_counted(tmp_path: Path) -> None:
    for split in ("train", "test"):
        samples = [(f"{split}{i}", {"png" if i < 4 else "heic": png(noise(i)), "cls": b"0"}) for i in range(6)]
        write_tar(tmp_path / f"{split}.tar", [*samples, ("notes", {"txt": b"of the set"})])
    images = opened(tmp_path, "webdataset")
    assert len(images.split("train")) == 4
    assert sum("left out 2 files that have no ending of an image: 2 .heic" in note for note in images.notes) == 2
    assert not any(".txt" in note for note in images.notes)


def test_tars_of_files_that_are_not_read_are_refused_with_their_endings(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [(str(i), {"heic": b"x", "cls": b"0"}) for i in range(6)])
    with pytest.raises(StorageError, match=r"hold no image; .*a\.tar: left out 6 files .*: 6 \.heic"):
        opened(tmp_path, "webdataset")


def test_a_shard_that_is_replaced_after_the_listing_gives_bad_rows_never_other_pixels(tmp_path: Path) -> None:
    as_tars(tmp_path / "d")
    as_tables(tmp_path / "t")
    tars, tables = opened(tmp_path / "d", "webdataset"), opened(tmp_path / "t", "parquet")
    write_tar(tmp_path / "d/set-train-000000.tar", cls([(k, s, n, 255 - x) for k, s, n, x in of("train")[0::3]]))
    (tmp_path / "t/train-00000-of-00001.parquet").write_bytes(b"PAR1")
    batch = tars.split("train").read(range(12))
    assert (~batch.good).sum() == 4
    assert all("another tar than when it was listed" in reason for reason in batch.reasons.values())
    batch = tables.split("train").read(range(12))
    assert list(np.flatnonzero(batch.good)) == [0, 1, 2], "whose group of rows was read before"
    np.testing.assert_array_equal(batch.images[:3], [pixels for *_, pixels in of("train")[:3]])
    assert all("another table than when it was listed" in reason for reason in batch.reasons.values())


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
    "named columns that are absent": (
        lambda path: (as_tables(path / "d"), "parquet", {"columns": "picture,kind"}),
        "has no column picture, which images.columns names; it has image, label",
    ),
    "a named column of labels that is absent": (
        lambda path: (as_tables(path / "d"), "parquet", {"columns": "image,kind"}),
        "has no column kind, which images.columns names; it has image, label",
    ),
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
