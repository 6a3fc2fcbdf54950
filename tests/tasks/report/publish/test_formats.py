"""Latents alone: the code on their cards reads them, and their Croissant metadata is valid and loads rows."""

import fnmatch
import re
from pathlib import Path
from typing import Any

import mlcroissant
import numpy as np
import pytest

from functa.storage.functaset.functaset import Functaset
from functa.storage.publish.fetch import fetch
from functa.storage.publish.manifest import Layout
from functa.tasks.report.publish.export import Request, export
from tests.helpers.flows.command import error_line, here
from tests.helpers.storage.functasets import filled, tree
from tests.helpers.storage.stub_hub import stub_hub

LAYOUTS: tuple[Layout, ...] = ("parquet", "webdataset", "datasets")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    filled(tmp_path / "store")
    return tmp_path / "store"


def valid(path: Path) -> Any:
    """Return a data set of Croissant metadata without an error or a warning."""
    dataset = mlcroissant.Dataset(str(path))
    issues = dataset.metadata.ctx.issues
    assert (issues.errors, issues.warnings) == (set(), set())
    return dataset


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_code_on_a_card_reads_what_was_fetched(
    store: Path, tmp_path: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = export(Request(str(store), str(tmp_path / "out"), "MIT", layout=layout))
    assert done.kind == "latents"
    fetch(str(tmp_path / "out"), str(tmp_path / "fetched"))
    card = (tmp_path / "fetched/README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path / "fetched")
    names: dict[str, Any] = {}
    exec(code, names)
    train = Functaset.open(store).load("train").dequantized()
    expected = {"parquet": train, "webdataset": train[-1], "datasets": train[:8]}[layout]
    found = np.concatenate([names["z"][-20:]]) if layout == "parquet" else names["z"]
    assert np.array_equal(found, expected)
    valid(Path("croissant.json"))


def test_croissant_loads_the_rows_of_parquet(store: Path, tmp_path: Path) -> None:
    export(Request(str(store), str(tmp_path / "out"), "CC0-1.0", layout="parquet"))
    dataset = valid(tmp_path / "out/croissant.json")
    latents = Functaset.open(store).load("test")
    rows = list(dataset.records("test"))
    assert [row["test/key"].decode() for row in rows] == latents.keys
    assert [row["test/label"] for row in rows] == latents.labels.tolist()
    z = np.array([row["test/z"] for row in rows], np.float32).reshape(latents.dequantized().shape)
    assert np.array_equal(z, latents.dequantized())
    assert dataset.metadata.license == ["https://spdx.org/licenses/CC0-1.0"]


def test_croissant_of_a_functaset_and_of_a_store_of_photographs_is_valid(store: Path, tmp_path: Path) -> None:
    filled(tmp_path / "photographs/16x8.zarr")
    filled(tmp_path / "photographs/8x16.zarr")
    for source in (store, tmp_path / "photographs"):
        out = tmp_path / "out" / source.name
        export(Request(str(source), str(out), "MIT"))
        found = valid(out / "croissant.json")
        for file in found.metadata.file_objects:
            assert (out / file.content_url).is_file()
        for files in found.metadata.file_sets:
            assert fnmatch.filter(tree(out), files.includes[0]), files.includes


def test_a_functaset_is_published_as_parquet_on_the_hub(store: Path) -> None:
    with stub_hub() as hub:
        export(Request(str(store), "hf://lab/latents", "MIT", layout="parquet"))
        files = hub.dataset("lab/latents").files
    assert {"data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"} <= files.keys()
    card = files["README.md"].decode()
    assert "- split: train\n    path: data/train-*.parquet" in card
    assert f'"url": "{hub.endpoint}/datasets/lab/latents"' in files["croissant.json"].decode()


def test_latents_of_several_sizes_are_refused(tmp_path: Path) -> None:
    for size in ("16x8", "8x16"):
        filled(tmp_path / "photographs" / f"{size}.zarr")
    done = here("export", str(tmp_path / "photographs"), "--to", str(tmp_path / "out"), "--licence", "MIT", "--format",
                "parquet")  # fmt: skip
    assert "holds 2 functasets, one for each size of images: name one" in error_line(done, 1)
    assert not (tmp_path / "out").exists()
