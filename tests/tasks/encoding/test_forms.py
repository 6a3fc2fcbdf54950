"""The same images as folders, tars, tables and arrays: the same latents, row for row."""

import re
import sys
from collections.abc import Callable, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest

from functa.storage.functaset.functaset import Functaset
from functa.tasks.encoding.plan import EncodeJob
from tests.helpers.storage.image_files import noise
from tests.helpers.storage.image_shards import (
    SAMPLES,
    Sample,
    as_arrays,
    as_folders,
    as_tables,
    as_tars,
    cls,
    members_of,
    of,
    write_tar,
)
from tests.helpers.tasks.encoding import encode, encode_job, trained_field

FORMS: dict[str, Callable[[Path, Sequence[Sample]], Path]] = {
    "npz": as_arrays,
    "folder": lambda folder, samples: as_folders(folder, samples=samples),
    "webdataset": lambda folder, samples: as_tars(folder, samples, shards=4),
    "parquet": lambda folder, samples: as_tables(folder, names=False, samples=samples, group=256),
}

FIELD = (
    "images.channels=3", "images.limit=null", "field.width=8", "field.depth=3", "field.channels=4",
    "inner.compile=off", "meta_train.steps=5", "meta_train.batch=4", "meta_train.validation_images=0",
    "encode.quantization.bits=32",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def job_of(form: str, images: Path, field: Path, store: Path, *more: str) -> EncodeJob:
    return encode_job(field, store, *FIELD, f"images.source={form}", f"images.location={images}", *more)[0]


def latents_in_order(store: Path, samples: Sequence[Sample]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return each split's latents and labels in the order of the samples, whatever their keys are."""
    found = {}
    for split in ("train", "test"):
        latents = Functaset.open(str(store)).load(split)
        order = np.argsort([int(re.findall(r"\d+", key.removesuffix(".png"))[-1]) for key in latents.keys])
        found[split] = (latents.dequantized()[order], latents.labels[order])
        assert len(order) == len(of(split, samples))
    return found


def check_forms(folder: Path, samples: Sequence[Sample], *more: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Encode the samples in each form; they give the same latents and labels. Return those."""
    places = {form: make(folder / form, samples) for form, make in FORMS.items()}
    field = trained_field(folder / "field", *FIELD, "images.source=npz", f"images.location={places['npz']}", *more)
    expected = None
    for form, images in places.items():
        encode(job_of(form, images, field, folder / f"{form}.zarr", *more))
        found = latents_in_order(folder / f"{form}.zarr", samples)
        expected = expected or found
        for split, (z, labels) in found.items():
            np.testing.assert_array_equal(labels, [label for _, _, label, _ in of(split, samples)], form)
            np.testing.assert_array_equal(z, expected[split][0], form)
    assert expected is not None
    return expected


def numbered(samples: Sequence[Sample]) -> list[Sample]:
    """Return samples whose files are named by their position in their split."""
    return [
        (f"{split}/{label}/{position:05d}", split, label, pixels)
        for split in ("train", "test")
        for position, (_, _, label, pixels) in enumerate(of(split, samples))
    ]


def test_every_form_of_the_same_images_has_the_same_latents_row_for_row(tmp_path: Path) -> None:
    check_forms(tmp_path, numbered(SAMPLES), "encode.shard_rows=8", "encode.chunk_rows=8", "encode.batch=3")


def test_one_more_tar_is_encoded_and_nothing_else(tmp_path: Path) -> None:
    images = as_tars(tmp_path / "tars", shards=4)
    small = ("encode.shard_rows=8", "encode.chunk_rows=8")
    tars = ("images.source=webdataset", f"images.location={images}", *small)
    field = trained_field(tmp_path / "field", *FIELD, *tars)
    job = job_of("webdataset", images, field, tmp_path / "store", *small)
    encode(job)
    first = Functaset.open(str(tmp_path / "store"))
    new = [(f"new_{i}", "train", 1, noise(7000 + i)) for i in range(3)]
    write_tar(images / "set-train-000004.tar", cls(new))
    encode(job)
    second = Functaset.open(str(tmp_path / "store"))
    known = {entry.fragment for entry in first.commit.fragments}
    (added,) = [entry for entry in second.commit.fragments if entry.fragment not in known]
    assert (added.rows, len(second.commit.fragments)) == (3, len(known) + 1)
    before, after = first.load("train"), second.load("train")
    assert {*after.keys} - {*before.keys} == {f"set-train-000004.tar/new_{i}" for i in range(3)}
    kept = [after.keys.index(key) for key in before.keys]
    np.testing.assert_array_equal(after.dequantized()[kept], before.dequantized())


@pytest.mark.faults
def test_a_tar_that_was_cut_off_and_one_with_a_bad_member_keep_what_is_whole_and_the_rerun_adds_the_rest(
    tmp_path: Path,
) -> None:
    images = as_tars(tmp_path / "tars", shards=2)
    tars = (
        "images.source=webdataset",
        f"images.location={images}",
        "images.resolution=8",
        "images.max_bad_fraction=0.9",
    )
    field = trained_field(tmp_path / "field", *FIELD, *tars)
    first, second = sorted(images.glob("set-train-*.tar"))
    whole = {path: path.read_bytes() for path in (first, second)}
    last = [member for member in members_of(first) if member.name.endswith(".png")][-1]
    first.write_bytes(whole[first][: last.offset])
    spoilt = members_of(second)[0]
    damaged = bytearray(whole[second])
    damaged[spoilt.offset_data : spoilt.offset_data + 30] = bytes(30)
    second.write_bytes(damaged)
    job = job_of("webdataset", images, field, tmp_path / "store", *tars[2:])
    encode(job)
    train = Functaset.open(str(tmp_path / "store"))
    assert (train.rows("train"), train.info()["bad"]) == (10, 1)  # of 12: one was cut off, one is no image
    for path, data in whole.items():
        path.write_bytes(data)
    encode(job)
    assert Functaset.open(str(tmp_path / "store")).rows("train") == 12


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.timeout(1800)
def test_12_000_photographs_have_the_same_latents_in_every_form(shared: Path, tmp_path: Path) -> None:
    spec = spec_from_file_location("unpack", shared / "data/unpack.py")
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(unpack := module_from_spec(spec))
    samples: list[Sample] = []
    for split in ("train", "test"):
        images, labels = unpack.load(shared / "data/cifar10_subset", split)
        samples += [(f"{split}/{n}", split, int(label), x) for n, (label, x) in enumerate(zip(labels, images))]
    found = check_forms(tmp_path, numbered(samples), "field.spatial=4")
    assert {split: len(z) for split, (z, _) in found.items()} == {"train": 10_000, "test": 2000}
    print("spread of the latents:", {split: float(z.std()) for split, (z, _) in found.items()}, file=sys.stderr)
