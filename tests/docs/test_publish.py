"""The page on publishing: its commands, in order, as written."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from functa.storage.functaset.functaset import Functaset
from tests.helpers.docs.pages import DOCS, blocks, commands
from tests.helpers.docs.reader import furnish
from tests.helpers.flows.command import here
from tests.helpers.storage.stub_hub import stub_hub

PAGE = DOCS / "how-to/publish.md"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    furnish(tmp_path)
    return tmp_path


def follow(folder: Path) -> dict[str, str]:
    """Run every command of the page; return what each printed."""
    printed = {}
    for line in (line for block in blocks(PAGE, "sh") for line in commands(block)):
        program, *arguments = shlex.split(line)
        if program == "echo":
            words, _, file = arguments
            with (folder / file).open("a") as card:
                card.write(words + "\n")
            continue
        assert program == "functa"
        done = here(*arguments, folder=folder)
        assert done.returncode == 0, f"{line}: {done.stderr}"
        printed[line] = done.stdout
    return printed


def test_the_page_can_be_followed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with stub_hub() as hub:
        printed = follow(folder)
    assert len(hub.model("lab/digits-functa").revisions) == 2  # replaced by the same
    assert hub.dataset("lab/digits-latents").private
    assert Functaset.open(folder / "functa-runs/from-the-hub").rows("test") == 200
    assert any("a root, " in text and "digests checked" in text for text in printed.values())
    assert len(list((folder / "pictures").glob("*.png"))) == 16
    assert len(list((folder / "samples").glob("sample-*.png"))) == 4
    assert Functaset.open(folder / "latents").rows("train") == 200
    for name in ("digits-parquet", "digits-tars", "digits-arrow"):
        assert (folder / name / "croissant.json").is_file()
    names: dict[str, Any] = {}
    for block in blocks(PAGE, "python"):
        exec(compile(block.text, str(block), "exec"), names)
    train = Functaset.open(folder / "functa-runs/digits").load("train")
    assert names["first"]["train/key"].decode() == train.keys[0]
    assert "Thanks to the people" in (folder / "digits-latents-2/README.md").read_text()
