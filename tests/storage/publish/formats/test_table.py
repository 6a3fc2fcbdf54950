"""Latents in other formats: what the libraries of each format read is what the functaset holds."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from functa.storage.errors import DamagedObject, StorageError
from functa.storage.functaset.commit import commit
from functa.storage.functaset.functaset import Functaset, Latents
from functa.storage.places.address import open_location
from functa.storage.publish.formats import parts as parts_module
from functa.storage.publish.formats.table import FORMATS, check_installed, files_in_format
from functa.storage.publish.manifest import Layout
from tests.helpers.storage.functasets import damage, filled, plan, store_with_bad_rows, write


@pytest.fixture(params=["whole", "bad rows", "float32 beside codes"])
def functaset(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Functaset:
    monkeypatch.setattr(parts_module, "PART_BYTES", 1500)  # several parts, of one shard or two
    if request.param == "bad rows":
        return store_with_bad_rows(tmp_path / "store")
    location = filled(tmp_path / "store")
    if request.param != "whole":
        added = plan(location, n=9, first=30, bits=32, quantizer=None)
        for shard in range(added.shards):
            write(location, added, shard)
        commit(location, [added.id])
    return Functaset.open(location)


def written(functaset: Functaset, layout: Layout, folder: Path) -> Path:
    with files_in_format(functaset, layout) as files:
        for path, read in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(read())
    return folder


def assert_equal(latents: Latents, found: dict[str, np.ndarray]) -> None:
    assert found["key"].tolist() == latents.keys
    for name, expected in (
        ("label", latents.labels), ("psnr", latents.psnr), ("augmentation", latents.augmentation),
        ("z", latents.dequantized()),
    ):  # fmt: skip
        assert found[name].dtype == expected.dtype, name
        assert np.array_equal(found[name], expected), name


def test_parquet_reads_back_equal(functaset: Functaset, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    folder = written(functaset, "parquet", tmp_path / "out")
    for split in functaset.splits:
        files = sorted(folder.glob(f"data/{split}-*.parquet"))
        assert len(files) > 1 or split == "test"
        table = pq.read_table(files)
        found = {name: table[name].to_numpy() for name in ("key", "label", "psnr", "augmentation")}
        z = table["z"].combine_chunks().flatten().to_numpy()
        assert_equal(functaset.load(split), found | {"z": z.reshape(-1, *functaset.latent_shape)})


def test_webdataset_reads_back_equal(functaset: Functaset, tmp_path: Path) -> None:
    import webdataset

    folder = written(functaset, "webdataset", tmp_path / "out")
    for split in functaset.splits:
        files = sorted(map(str, folder.glob(f"{split}-*.tar")))
        rows = list(webdataset.WebDataset(files, shardshuffle=False, empty_check=False).decode())
        assert [row["__key__"] for row in rows] == [f"{number:09d}" for number in range(len(rows))]
        found = {
            "key": np.array([row["json"]["key"] for row in rows], object),
            "label": np.array([row["cls"] for row in rows], np.int32),
            "psnr": np.array([row["json"]["psnr"] for row in rows], np.float32),
            "augmentation": np.array([row["json"]["augmentation"] for row in rows], np.int32),
            "z": np.stack([row["z.npy"] for row in rows]),
        }
        assert_equal(functaset.load(split), found)


def test_datasets_reads_back_equal(functaset: Functaset, tmp_path: Path) -> None:
    import datasets

    folder = written(functaset, "datasets", tmp_path / "out")
    loaded = datasets.load_from_disk(str(folder)).with_format("numpy")
    assert set(loaded) == set(functaset.splits)
    for split in functaset.splits:
        kinds = {name: getattr(kind, "dtype", "") for name, kind in loaded[split].features.items()}
        assert kinds.pop("key") == "string"
        rows = loaded[split][:]  # as NumPy's own kinds
        found = {name: np.asarray(rows[name]).astype(kind) for name, kind in kinds.items()}
        assert_equal(functaset.load(split), found | {"key": np.asarray(rows["key"])})


@pytest.mark.parametrize("layout", FORMATS)
def test_the_same_functaset_gives_the_same_bytes(tmp_path: Path, layout: Layout) -> None:
    functaset = Functaset.open(filled(tmp_path / "store"))
    ones, others = (written(functaset, layout, tmp_path / name) for name in ("one", "other"))
    files = {path.relative_to(ones): path.read_bytes() for path in ones.rglob("*") if path.is_file()}
    assert files
    for path, data in files.items():
        assert (others / path).read_bytes() == data, path


@pytest.mark.faults
@pytest.mark.parametrize("layout", FORMATS)
def test_a_damaged_shard_is_named(tmp_path: Path, layout: Layout) -> None:
    filled(tmp_path / "store")
    damage(next((tmp_path / "store").glob("fragments/*/z/c/1/0/0/0")), "flipped")
    with pytest.raises(DamagedObject, match=r"z/c/1/0/0/0: was altered"):
        written(Functaset.open(open_location(str(tmp_path / "store"))), layout, tmp_path / "out")


@pytest.mark.parametrize("layout", [name for name, each in FORMATS.items() if each.package])
def test_a_package_that_is_not_installed_is_named_with_its_extra(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("functa.storage.publish.formats.table.find_spec", lambda name: None)
    assert importlib.util.find_spec(FORMATS[layout].package) is not None
    extra = FORMATS[layout].extra
    with pytest.raises(StorageError, match=rf"--format {layout} needs .*: pip install 'spatial-functa\[{extra}\]'"):
        check_installed(layout)
