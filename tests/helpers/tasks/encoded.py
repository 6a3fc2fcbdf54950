"""A small functaset of digits, meta-trained and encoded within seconds."""

from pathlib import Path

from functa.flows.config.load import load_config
from functa.flows.config.schema import PipelineConfig
from functa.tasks.encoding.encode import encode_group
from functa.tasks.encoding.finalise import finalise
from functa.tasks.encoding.plan import EncodeJob, plan
from functa.tasks.training.meta_train import run as train_field
from functa.tasks.training_jobs import MetaTrainJob
from tests.helpers.flows.tiny_config import TINY


def encoded(folder: Path, *overrides: str) -> tuple[PipelineConfig, EncodeJob]:
    """Encode 200 digits per split in float32 with a field of 20 steps; return the config and the job."""
    config = load_config("digits", [*TINY, "encode.quantization.bits=32", *overrides])
    train_field(
        MetaTrainJob(
            seed=0, images=config.images, field=config.field, inner=config.inner, meta_train=config.meta_train,
            device="cpu", output=str(folder / "field"), digest="d",
        ),
        lambda row: None,
    )  # fmt: skip
    job = EncodeJob(
        images=config.images, encode=config.encode, field=str(folder / "field"), field_digest="feed",
        functaset=str(folder / "functaset"), device="cpu",
    )  # fmt: skip
    todo = plan(job)
    for group in todo.groups:
        encode_group(job, group, 400)
    finalise(job, todo)
    return config, job
