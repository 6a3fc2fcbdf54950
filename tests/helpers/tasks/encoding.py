"""Encoding runs on a small trained field: jobs, whole runs, stored bytes, and a bit of damage."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from functa.flows.config.load import load_config
from functa.flows.config.schema import PipelineConfig
from functa.tasks.encoding.encode import encode_group
from functa.tasks.encoding.finalise import finalise
from functa.tasks.encoding.plan import EncodeJob, Planned, plan
from functa.tasks.training.meta_train import run as train_field
from functa.tasks.training_jobs import MetaTrainJob
from tests.helpers.flows.tiny_config import TINY
from tests.helpers.storage.image_files import encoded, noise


def trained_field(folder: Path, *overrides: str, base: Sequence[str] = TINY) -> Path:
    """Train a field on digits, or other images of the overrides, for a few steps; return its folder."""
    config = load_config("digits", [*base, *overrides])
    train_field(
        MetaTrainJob(
            seed=0, images=config.images, field=config.field, inner=config.inner, meta_train=config.meta_train,
            device="cpu", output=str(folder), digest="d",
        ),
        lambda row: None,
    )  # fmt: skip
    return folder


def encode_job(field: Path, store: Path, *overrides: str) -> tuple[EncodeJob, PipelineConfig]:
    """Return the job that encodes 200 digits per split, and its config."""
    config = load_config("digits", [*TINY, *overrides])
    return EncodeJob(
        images=config.images, encode=config.encode, field=str(field), field_digest="feed", functaset=str(store),
        device="cpu",
    ), config  # fmt: skip


def encode_planned(job: EncodeJob, todo: Planned) -> dict[str, Any]:
    """Encode and commit what was planned."""
    for group in todo.groups:
        encode_group(job, group, 400)
    return finalise(job, todo)


def encode(job: EncodeJob) -> dict[str, Any]:
    """Plan, encode and commit."""
    return encode_planned(job, plan(job))


def repair(job: EncodeJob) -> Planned:
    """Repair the functaset; return what was planned."""
    todo = plan(job.model_copy(update={"repair": True}))
    encode_planned(job, todo)
    return todo


def file_bytes(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below the folder, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_noise(path: Path, seed: int, side: int = 8) -> None:
    """Write a grey PNG file of random pixels."""
    path.write_bytes(encoded(Image.fromarray(noise(seed, side, channels=1))))


def flip_bit(path: Path) -> None:
    """Damage a file: flip one bit in its middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
