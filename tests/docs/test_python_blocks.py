"""Every Python block of the pages runs as written, on the root of the demo."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from functa.storage.functaset.functaset import Functaset
from tests.helpers.docs.pages import DOCS, PROJECT, Block, blocks
from tests.helpers.docs.reader import furnish

PAGES = (PROJECT / "README.md", DOCS / "how-to/python.md", DOCS / "reference/files.md", DOCS / "tutorial/first-run.md")
QUICK = [block for page in PAGES for block in blocks(page, "python") if "functa.run(" not in block.text]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reader")
    furnish(folder)
    return folder


@pytest.fixture(autouse=True)
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def execute(block: Block) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(block.text, str(block), "exec"), names)
    return names


@pytest.mark.parametrize("block", QUICK, ids=str)
def test_a_python_block_runs_as_written(block: Block) -> None:
    execute(block)


def test_the_reader_in_plain_zarr_gets_what_the_functaset_holds() -> None:
    (page,) = blocks(DOCS / "reference/files.md", "python")
    names = execute(page)
    train = Functaset.open("functa-runs/digits/functaset.zarr").load("train")
    assert np.array_equal(names["labels"], train.labels)
    assert np.array_equal(names["z"], train.dequantized())
