"""Planning of an encoding run: which rows go where, and the quantiser's ranges, before any worker starts."""

from typing import Any

import numpy as np
import torch

from models.config import Config
from models.inner import InnerLoop
from storage.checkpoints import load_checkpoint
from storage.config import ImagesConfig
from storage.errors import StorageError
from storage.images import Images, open_images
from storage.locations import open_location
from storage.plans import create_functaset, plan_fragment
from storage.quantization import Quantizer, calibrate
from tasks.config import EncodeConfig
from tasks.training.device import choose_device
from tasks.training.loop import best_weights
from tasks.training.meta_train import load_field
from tasks.training.pictures import as_float, spread

SPLITS = ("train", "test")


class EncodeJob(Config):
    """What every task of one encoding run needs; small and JSON, as it travels to workers."""

    images: ImagesConfig
    encode: EncodeConfig
    field: str  # URI of the field's checkpoint
    field_digest: str
    functaset: str  # URI
    device: str


class ShardGroup(Config):
    """Shards of one fragment that one task encodes."""

    fragment: str
    split: str
    shards: tuple[int, ...]
    images: int


def plan(job: EncodeJob) -> list[ShardGroup]:
    """Creates the functaset and one fragment per split (or adopts what stands); returns the work to map over."""
    location = open_location(job.functaset)
    location.preflight_write()
    images = open_images(job.images)
    field, inner, metadata = load_field(job.field)
    checkpoint = load_checkpoint(open_location(job.field))
    assert checkpoint is not None
    _check_fits(images, metadata, job.field)
    create_functaset(
        location,
        fingerprint=fingerprint(job, metadata),
        field={k: v.numpy() for k, v in best_weights(checkpoint.tensors).items()},
        field_config={k: metadata[k] for k in ("field", "inner", "image_channels", "resolution")},
        field_digest=job.field_digest,
    )
    loop = InnerLoop(field.to(choose_device(job.device)), inner, (images.resolution, images.resolution))
    quantizer = _calibrated(job, images, loop)
    groups: list[ShardGroup] = []
    for split in SPLITS:
        groups += _plan_split(job, images, split, quantizer, field.config.latent_shape)
    return groups


def fingerprint(job: EncodeJob, metadata: dict[str, Any]) -> dict[str, Any]:
    """Everything that a user chose that determines latents (design section 6)."""
    images = job.images.model_dump(mode="json", include={"source", "channels", "resolution"})
    return {
        "field": job.field_digest,
        **{f"inner.{k}": v for k, v in metadata["inner"].items() if k != "compile"},
        **{f"images.{k}": v for k, v in images.items()},
        **{f"quantization.{k}": v for k, v in job.encode.quantization.model_dump(mode="json").items()},
    }


def _check_fits(images: Images, metadata: dict[str, Any], field: str) -> None:
    ours = (images.resolution, images.channels)
    trained = (metadata["resolution"], metadata["image_channels"])
    if ours != trained:
        raise StorageError(
            f"{field} was trained on {trained[0]}x{trained[0]} images of {trained[1]} channels, these are "
            f"{ours[0]}x{ours[0]} of {ours[1]}: set images.resolution and images.channels to match, or train a field"
        )


def _calibrated(job: EncodeJob, images: Images, loop: InnerLoop) -> Quantizer | None:
    if job.encode.quantization.bits == 32:
        return None
    split = images.split("train")
    device = next(loop.field.parameters()).device
    latents = []
    rows = spread(len(split), job.encode.calibration_images)
    for start in range(0, len(rows), job.encode.batch):
        batch = split.read(rows[start : start + job.encode.batch])
        if batch.good.any():
            latents.append(loop.encode(as_float(batch.images[batch.good]).to(device)).cpu())
    if not latents:
        raise StorageError(f"none of the {len(rows)} calibration images could be read")
    return calibrate(job.encode.quantization, torch.cat(latents).numpy())


def _plan_split(
    job: EncodeJob, images: Images, split: str, quantizer: Quantizer | None, latent_shape: tuple[int, int, int]
) -> list[ShardGroup]:
    rows = images.split(split)
    if not len(rows):
        return []
    plan = plan_fragment(
        open_location(job.functaset),
        split=split,
        keys=rows.keys,
        labels=np.asarray(rows.labels),
        tokens=rows.tokens,
        latent_shape=latent_shape,
        shard_rows=job.encode.shard_rows,
        chunk_rows=job.encode.chunk_rows,
        quantizer=quantizer,
        codec=job.encode.quantization.codec,
    )
    shards = range(plan.shards)
    size = job.encode.group_shards
    return [
        ShardGroup(
            fragment=plan.id,
            split=split,
            shards=tuple(shards[i : i + size]),
            images=sum(plan.shard_size(shard) for shard in shards[i : i + size]),
        )
        for i in range(0, len(shards), size)
    ]
