"""Stages that have finished by their records, with a small output of the right form: nothing is trained."""

from pathlib import Path
from typing import Any

import numpy as np

from functa.flows.config.load import load_config
from functa.flows.config.schema import PipelineConfig
from functa.flows.ledger import Ledger
from functa.storage.functaset.commit import commit
from functa.storage.functaset.history import latest
from functa.storage.runs.checkpoints import save_checkpoint
from functa.storage.runs.stage_records import StageRecord, read_record, write_record
from tests.helpers.storage.functasets import new_store

WEIGHTS = {"model.w": np.arange(3.0)}


def config(*overrides: str) -> PipelineConfig:
    return load_config("digits", list(overrides))


def ledger(root: Path, *overrides: str, from_root: Path | None = None) -> Ledger:
    return Ledger(config(*overrides), str(root), None if from_root is None else str(from_root))


def finish(book: Ledger, stage: str, digest: str = "feed", **figures: object) -> None:
    """Finish a stage like a flow does, with a small output of the right form."""
    with book.working(stage) as record:
        place = book.location.child(*record.output.split("/"))
        if stage == "encode":
            new_store(place.uri)
            described: Any = figures.get("info", {})
            while (newest := latest(place)) is None or newest.version < described.get("version", 1):
                commit(place, [], again=True)  # of no rows
        elif stage == "evaluate":
            place.write("run.json", b"{}")
            book.location.write("metrics.json", b"{}")
            book.location.write("report.html", b"")
        else:
            save_checkpoint(place, 5, WEIGHTS, {"finished": True, "weights_digest": digest})
        book.finish(record, digest, {"seconds": 1.0, **figures})


def finish_all(root: Path, *overrides: str) -> Ledger:
    book = ledger(root, *overrides)
    for stage in ("meta_train", "encode", "train_classifier", "train_diffusion", "evaluate"):
        finish(book, stage)
    return book


def recorded(book: Ledger, stage: str) -> StageRecord:
    """Return the record that a stage has."""
    record = read_record(book.location, stage)
    assert record is not None
    return record


def change_record(book: Ledger, stage: str, **changes: object) -> None:
    """Replace fields of a stage's record, as another version or a killed process would have left them."""
    write_record(book.location, recorded(book, stage).model_copy(update=changes))
