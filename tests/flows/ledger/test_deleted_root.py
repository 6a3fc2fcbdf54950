"""A root that is deleted under a run: one line, a status that is not 0, and what is left is whole or refused."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from functa.flows.ledger import RootDeleted
from functa.storage.errors import StorageError
from functa.storage.runs.stage_records import read_record, write_record
from functa.tasks.stage_table import STAGES
from tests.helpers.flows.finished_stages import finish, ledger
from tests.helpers.flows.tiny_config import TINY

pytestmark = pytest.mark.faults

PROJECT = Path(__file__).parents[3]
COMMAND = [sys.executable, "-c", "from functa.flows.cli.main import main; main()"]
SETTINGS = [*TINY, *(f"{section}.checkpoint_seconds=0.001" for section in ("meta_train", "classifier", "diffusion"))]
SETTINGS += [f"{section}.steps=150" for section in ("meta_train", "classifier", "diffusion")]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("begun_anew", [False, True])
def test_a_root_deleted_under_a_stage_ends_it_with_one_line_and_is_not_made_anew(
    stage: str, begun_anew: bool, tmp_path: Path
) -> None:
    book = ledger(tmp_path / "root")
    for earlier in STAGES:
        if earlier == stage:
            break
        finish(book, earlier)

    def delete() -> None:
        (tmp_path / "root").rename(tmp_path / f"deleted-{len(list(tmp_path.iterdir()))}")
        if begun_anew:
            write_record(book.location, record.model_copy(update={"owner": "another/1/boot"}))

    left = ["root"] if begun_anew else []
    words = (
        f"was deleted, or begun anew, while {STAGES[stage].command} worked in it.*; delete what is left there, then run"
    )
    with pytest.raises(RootDeleted, match=words) as caught, book.working(stage) as record:
        delete()
        book.finish(record, "feed", {"seconds": 1.0})
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir() if path.name == "root"] == left
    with pytest.raises(RootDeleted, match=r"\(plan.json: is missing\)") as caught, book.working(stage) as record:
        delete()
        raise StorageError("plan.json: is missing")
    assert "\n" not in str(caught.value)
    with pytest.raises(KeyboardInterrupt), book.working(stage) as record:
        delete()
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir() if path.name == "root"] == left
    assert not begun_anew or read_record(book.location, stage).owner == "another/1/boot"  # type: ignore[union-attr]


def begin(root: Path, stage: str) -> "subprocess.Popen[str]":
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    return subprocess.Popen(
        [*COMMAND, stage, "digits", "--root", str(root), *settings], cwd=PROJECT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.timeout(900)
def test_a_command_whose_root_is_deleted_in_the_middle_names_it_and_the_next_command_starts_again(
    tmp_path: Path,
) -> None:
    root = tmp_path / "root"
    process = begin(root, "meta-train")
    deadline = time.monotonic() + 300
    while process.poll() is None and not list(root.glob("checkpoints/field/step-*.json")):
        assert time.monotonic() < deadline, "training does not begin"
        time.sleep(0.01)
    shutil.rmtree(root, ignore_errors=True)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1, errors
    (line,) = [line for line in errors.splitlines() if line.startswith("functa: ")]
    assert "was deleted, or begun anew, while meta-train worked in it" in line
    assert "Traceback" not in errors
    assert not (root / "stages").exists(), "what is left looks like a run"
    assert begin(root, "meta-train").wait(timeout=300) == 0
