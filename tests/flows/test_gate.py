"""The quality gate of a finished run: what it names, and the report that follows a gate that has changed."""

import shutil
from pathlib import Path

import pytest

from functa.flows.gate import GateFailed, check_gate
from functa.flows.ledger import Ledger
from functa.storage.places.address import open_location
from functa.tasks.report.run_folder import RunFolder, load_folder
from tests.helpers.flows.finished_stages import finish, ledger, recorded

FIELD_ALONE = ("classifier=null", "diffusion=null")
FIGURES = {"psnr_test": 21.3, "bits_per_dim": 6.0}


def measured(root: Path, *gate: str) -> Ledger:
    """Return a root whose evaluation measured FIGURES under a gate; its report is empty."""
    book = ledger(root, *FIELD_ALONE, *gate)
    for stage in ("meta_train", "encode"):
        finish(book, stage)
    finish(book, "evaluate", **FIGURES)
    run = book.output(recorded(book, "evaluate"))
    folder = RunFolder(
        root=book.root, run=run, config=book.config.model_dump(mode="json"), records={}, metrics=FIGURES,
        outputs={"encode": book.output(recorded(book, "encode"))}, classes=[], bad_inputs=[], images_digest="",
        created="2026-01-01T00:00:00Z",
    )  # fmt: skip
    open_location(run).write("run.json", folder.model_dump_json().encode())
    return book


def report(book: Ledger) -> bytes:
    return book.location.read("report.html")


def test_a_run_that_reaches_its_thresholds_passes_and_its_report_stays(tmp_path: Path) -> None:
    for gate in ((), ("gate.min_psnr=21",)):
        book = measured(tmp_path / str(len(gate)), *gate)
        check_gate(book)
        assert report(book) == b""


def test_every_missed_threshold_is_named_with_the_report(tmp_path: Path) -> None:
    book = measured(tmp_path, "gate.min_psnr=25", "gate.min_top1=0.5", "gate.max_fid=5")
    with pytest.raises(GateFailed) as failed:
        check_gate(book)
    assert str(failed.value) == (
        "psnr_test 21.3 dB is below gate.min_psnr 25 dB; "
        "top1_test was not measured, but gate.min_top1 0.5 asks for it; "
        f"fid was not measured, but gate.max_fid 5 asks for it; report: {book.root}/report.html"
    )


@pytest.mark.parametrize(("before", "after"), [((), ("gate.min_psnr=21",)), (("gate.min_psnr=21",), ())])
def test_the_report_shows_the_gate_that_was_checked_last(
    before: tuple[str, ...], after: tuple[str, ...], tmp_path: Path
) -> None:
    measured(tmp_path, *before)
    book = ledger(tmp_path, *FIELD_ALONE, *after)
    check_gate(book)
    run = book.output(recorded(book, "evaluate"))
    assert load_folder(run).config["gate"] == book.config.gate.model_dump(mode="json")
    written = report(book)
    assert written
    check_gate(book)
    assert report(book) == written


def test_the_report_of_a_root_that_was_copied_is_written_there_alone(tmp_path: Path) -> None:
    original = measured(tmp_path / "original")
    shutil.copytree(tmp_path / "original", tmp_path / "copy")
    copy = ledger(tmp_path / "copy", *FIELD_ALONE, "gate.min_psnr=25")
    with pytest.raises(GateFailed, match="/copy/report"):
        check_gate(copy)
    assert report(copy) and not report(original)
    folder = load_folder(copy.output(recorded(copy, "evaluate")))
    assert (folder.root, folder.outputs["encode"]) == (copy.root, f"{copy.root}/functaset.zarr")
