"""A root whose stages have really run, each a function called in this process: no server, no children."""

from pathlib import Path
from typing import Any

from functa.flows.config.load import load_config
from functa.flows.jobs import classifier_job, diffusion_job, encode_job, meta_train_job
from functa.flows.ledger import Ledger
from functa.storage.runs.stage_records import StageRecord
from functa.tasks.encoding.encode import encode_group
from functa.tasks.encoding.finalise import finalise
from functa.tasks.encoding.plan import plan
from functa.tasks.training import classifier, diffusion, meta_train
from tests.helpers.flows.tiny_config import TINY

STAGES = ("meta_train", "encode", "train_classifier", "train_diffusion")


def trained_root(
    root: Path, *overrides: str, from_root: Path | None = None, stages: tuple[str, ...] = STAGES
) -> Ledger:
    """Run the stages that are up to date neither in the root nor in the one reused from, like the flows do."""
    config = load_config("digits", [*TINY, "dispatch.device=cpu", *overrides])
    ledger = Ledger(config, str(root), None if from_root is None else str(from_root))
    for stage in stages:
        if ledger.up_to_date(stage) is None:
            with ledger.working(stage) as record:
                figures = _work(ledger, record)
                ledger.finish(record, figures.pop("weights_digest"), figures)
    return ledger


def _work(ledger: Ledger, record: StageRecord) -> dict[str, Any]:
    if record.stage == "meta_train":
        return meta_train.run(meta_train_job(ledger, record), lambda row: None)
    if record.stage == "encode":
        job = encode_job(ledger, record)
        todo = plan(job)
        for group in todo.groups:
            encode_group(job, group, 400)
        done = finalise(job, todo)
        return done | {"weights_digest": done["info"]["content"]}
    if record.stage == "train_classifier":
        return classifier.run(classifier_job(ledger, record), lambda row: None)
    return diffusion.run(diffusion_job(ledger, record), lambda row: None)
