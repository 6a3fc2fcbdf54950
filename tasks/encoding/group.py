"""Encoding of a group of shards: read, encode, write, receipt. Running it twice changes nothing."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.compilation import should_compile
from models.cost import encode_passes, forward_flops
from models.inner import InnerLoop
from models.metrics import psnr_of_errors
from storage.errors import StorageError
from storage.fragments import read_receipt, write_shard
from storage.images import Images
from storage.locations import open_location
from storage.plans import Plan, load_plan, plan_rows
from tasks.encoding.environment import environment
from tasks.encoding.plan import EncodeJob, ShardGroup, check_fits
from tasks.encoding.planned import PlannedImages
from tasks.training.device import choose_device
from tasks.training.meta_train import load_field
from tasks.training.pictures import as_float


def encode_group(
    job: EncodeJob, group: ShardGroup, images_in_run: int, progress: Callable[[int, int, str], None] | None = None
) -> dict[str, Any]:
    """Encodes every shard of the group that has no receipt yet; returns its stats.

    They are images, bad, psnr (a sum), adopted (shards), the seconds of read, encode and write, and mode (compiled or
    eager, and why). `progress` is called after each shard with (shards done, shards, one line).
    """
    location = open_location(job.functaset)
    plan = load_plan(location, group.fragment)
    left = [shard for shard in group.shards if read_receipt(location, plan, shard) is None]
    stats: dict[str, Any] = {"images": 0, "bad": 0, "read": 0.0, "encode": 0.0, "write": 0.0, "psnr": 0.0, "mode": ""}
    stats["adopted"] = len(group.shards) - len(left)
    tell = progress or (lambda done, shards, line: None)
    if not left:
        tell(len(group.shards), len(group.shards), describe_stats(stats))
        return stats
    images = PlannedImages(job.images, job.encode.augmentation)
    loop, stats["mode"] = _loop(job, images.images, images_in_run)
    for done, shard in enumerate(left, stats["adopted"] + 1):
        _encode_shard(job, plan, shard, images, loop, stats, group)
        tell(done, len(group.shards), describe_stats(stats))
    return stats


def _loop(job: EncodeJob, images: Images, images_in_run: int) -> tuple[InnerLoop, str]:
    device = choose_device(job.device)
    field, inner, metadata = load_field(job.field)
    check_fits(images, metadata, job.field)  # once more: the source may have changed since it was planned
    resolution = (metadata["resolution"], metadata["resolution"])
    work = float(encode_passes(inner) * forward_flops(field.config, resolution, field.image_channels)) * images_in_run
    compiled, why = should_compile(inner.compile, work, device)
    return InnerLoop(field.to(device), inner, resolution, compiled).prepared(images_in_run), why


def _encode_shard(
    job: EncodeJob,
    plan: Plan,
    shard: int,
    images: PlannedImages,
    loop: InnerLoop,
    stats: dict[str, Any],
    group: ShardGroup,
) -> None:
    location = open_location(job.functaset)
    begun = time.monotonic()
    rows = plan_rows(location, plan, shard)
    batch = images.read(rows)
    if group.readable and batch.reasons:
        row, reason = min(batch.reasons.items())
        raise StorageError(f"{rows.keys[row]}: {reason}; restore the image, or give its row up: --retire-lost")
    read = time.monotonic()
    z, errors = encode_images(loop, batch.images, job.encode.batch)
    encoded = time.monotonic()
    receipt = write_shard(
        location,
        plan,
        shard,
        latents=z.numpy(),
        labels=rows.labels,
        psnr=psnr_of_errors(errors).numpy(),
        sha256=batch.sha256,
        good=batch.good,
        reasons=batch.reasons,
        # Of a few rows more may lie outside than of the many that the range was set by.
        max_clip_fraction=1.0 if group.standing else job.encode.quantization.max_clip_fraction,
        seconds=encoded - begun,
        versions=environment(loop),
    )
    written = time.monotonic()
    stats["images"] += len(rows.labels)
    stats["bad"] += len(receipt.bad)
    stats["psnr"] += receipt.psnr.sum
    for name, seconds in (("read", read - begun), ("encode", encoded - read), ("write", written - encoded)):
        stats[name] += seconds


def describe_stats(stats: dict[str, Any]) -> str:
    """One line: images, rate, the read / encode / write split, PSNR, what was bad or stood already."""
    seconds = stats["read"] + stats["encode"] + stats["write"]
    if not stats["images"]:
        return f"all {stats['adopted']} shards stood already"
    split = " / ".join(f"{name} {stats[name] / seconds:.0%}" for name in ("read", "encode", "write"))
    good = stats["images"] - stats["bad"]
    psnr = f", PSNR {stats['psnr'] / good:.2f} dB" if good else ""
    return (
        f"{stats['images']} images, {stats['images'] / seconds:.0f} images/s ({split}){psnr}, {stats['bad']} bad inputs"
    )


def encode_images(loop: InnerLoop, images: np.ndarray, batch: int) -> tuple[Tensor, Tensor]:
    """uint8 [n, H, W, ch] -> latents [n, s, s, c] and squared errors [n], on the CPU.

    The last batch is filled up, so that every call has one shape: one compiled graph, and the same bits for an
    image wherever it stands.
    """
    device = next(loop.field.parameters()).device
    latents, errors = [], []
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        filled = np.zeros((batch, *part.shape[1:]), part.dtype)
        filled[: len(part)] = part
        pixels = as_float(filled).to(device)
        z = loop.encode(pixels)
        with torch.no_grad():
            error = (loop.field(z, loop.resolution) - pixels).square().mean((1, 2, 3))
        latents.append(z[: len(part)].cpu())
        errors.append(error[: len(part)].cpu())
    return torch.cat(latents), torch.cat(errors)
