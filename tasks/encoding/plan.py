"""Planning of an encoding run: which rows go where, and the quantiser's ranges, before any worker starts."""

from collections.abc import Collection
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from functa.models.compute.device import choose_device
from functa.models.config import Config
from functa.models.field.inner import InnerLoop
from functa.storage.config import ImagesConfig
from functa.storage.errors import StorageError
from functa.storage.functaset.fragment import Fragment
from functa.storage.functaset.header import create_functaset
from functa.storage.functaset.history import Ranges, as_ranges, latest
from functa.storage.functaset.plan import SPLITS, RowTable
from functa.storage.functaset.planning import plan_fragment
from functa.storage.functaset.quantizer import Quantizer
from functa.storage.images.source import Images, open_images
from functa.storage.places.address import open_location
from functa.storage.runs.checkpoints import load_checkpoint
from functa.storage.upkeep.status import bytes_left
from functa.tasks.config import EncodeConfig
from functa.tasks.encoding.changes import changes, refuse_great_loss, standing_quantizer
from functa.tasks.encoding.keyed_images import PlannedImages, of_split
from functa.tasks.encoding.ranges import choose_quantizer
from functa.tasks.encoding.repair import find_damage, held_names, other_images, put_back, wanted_rows
from functa.tasks.inputs.pictures import as_float, spread
from functa.tasks.trained import best_weights, load_field


class EncodeJob(Config):
    """What every task of one encoding run needs; small and JSON, as it travels to workers."""

    images: ImagesConfig
    encode: EncodeConfig
    field: str  # URI of the field's checkpoint
    field_digest: str
    functaset: str  # URI
    device: str
    retry_bad: bool = False  # encode again what could not be encoded
    repair: bool = False  # encode damaged shards again, rather than what is not there yet
    retire_lost: bool = False  # give up rows of images that are gone, however many, and in a repair of changed ones


class ShardGroup(Config):
    """Shards of one fragment that one task encodes."""

    fragment: str
    split: str
    shards: tuple[int, ...]
    images: int
    readable: bool = False  # an image that is not readable ends it, and is no bad row
    standing: bool = False  # by ranges that were set by others' latents: however many numbers they clip, they stay


class Planned(Config):
    """The work to map over, and what the commit that ends it does to fragments that stand."""

    groups: tuple[ShardGroup, ...]
    fragments: tuple[str, ...]  # to be shown
    retire: dict[str, Ranges] = {}  # fragment -> rows
    drop: tuple[str, ...] = ()
    contents: dict[str, str] = {}  # fragment -> the content that it must come out with


def plan(job: EncodeJob) -> Planned:
    """Creates the functaset, or adopts what stands; a fragment per split of what is new, or one of what is damaged."""
    location = open_location(job.functaset)
    location.preflight_write()  # before the images are opened, which may take a while
    images = open_images(job.images)
    field, inner, metadata = load_field(job.field)
    checkpoint = load_checkpoint(open_location(job.field))
    assert checkpoint is not None
    check_fits(images, metadata, job.field)
    create_functaset(
        location,
        fingerprint=fingerprint(job, metadata),
        field={k: v.numpy() for k, v in best_weights(checkpoint.tensors).items()},
        field_config={k: metadata[k] for k in ("field", "inner", "image_channels", "resolution")},
        field_digest=job.field_digest,
    )
    loop = InnerLoop(field.to(choose_device(job.device)), inner, (images.resolution, images.resolution))
    if job.repair:
        return _planned_repair(job, images, loop)
    newest = latest(location)
    if newest is None:
        rows = {split: _source_rows(job, images, split) for split in SPLITS}
        retire: dict[str, list[int]] = {}
        taken: tuple[str, ...] = ()
    else:
        found = {
            split: changes(location, newest, split, _source_rows(job, images, split), job.retry_bad) for split in SPLITS
        }
        if not job.retire_lost:
            refuse_great_loss(found, job.images)
        rows = {split: each.rows for split, each in found.items()}
        retire = {fragment: gone for each in found.values() for fragment, gone in each.retire.items()}
        taken = (*newest.retired_fragments, *(entry.fragment for entry in newest.fragments))
    plans = []
    if any(each.keys for each in rows.values()):
        quantizer = (newest and standing_quantizer(location, newest)) or _calibrated(job, images, loop)
        plans = [
            _plan_rows(job, each, split, quantizer, loop, taken=taken) for split, each in rows.items() if each.keys
        ]
    location.preflight_write(bytes_left(location, plans))
    return Planned(
        groups=_groups(plans, job.encode.group_shards, standing=newest is not None),
        fragments=tuple(each.id for each in plans),
        retire={fragment: as_ranges(gone) for fragment, gone in retire.items()},
    )


def _planned_repair(job: EncodeJob, images: Images, loop: InnerLoop) -> Planned:
    """Each damaged fragment's rows in a fragment of their own, by the quantiser that it had."""
    location = open_location(job.functaset)
    damage = find_damage(location)
    put_back(location, damage)
    plans, contents = [], {}
    wanted = wanted_rows(location, damage, job.retire_lost)
    source = PlannedImages(job.images, job.encode.augmentation)
    for each in wanted:
        split = each.entry.split
        if each.rows is None:
            held = held_names(location, split, damage)
            whole = _source_rows(job, images, split)
            names = list(zip(whole.keys, whole.augmentations.tolist(), strict=True))
            newest = latest(location)
            hidden = (newest and newest.retires(key) for key, _ in names)
            kept = [row for row, (name, out) in enumerate(zip(names, hidden)) if name not in held and not out]
            rows = whole.take(kept)
            if len(rows.keys) != each.entry.rows + each.entry.bad:
                raise other_images(each.entry.fragment)
        else:
            rows = source.again(each.rows, job.retire_lost)
        if rows.keys:
            quantizer = each.quantizer or _calibrated(job, images, loop)
            plans.append(_plan_rows(job, rows, split, quantizer, loop, replaces=each.entry.fragment))
            contents |= {plans[-1].id: each.content} if each.content else {}
    location.preflight_write(bytes_left(location, plans))
    return Planned(
        groups=_groups(plans, job.encode.group_shards, {plan.id for plan in plans} - contents.keys(), standing=True),
        fragments=tuple(each.id for each in plans),
        retire={each.entry.fragment: as_ranges(each.retire) for each in wanted if each.retire},
        drop=tuple(sorted(damage.fragments)),
        contents=contents,
    )


def _source_rows(job: EncodeJob, images: Images, split: str) -> RowTable:
    """All rows of a split; test images are never augmented."""
    return of_split(images.split(split), job.encode.augmentation.count if split == "train" else 0)


def fingerprint(job: EncodeJob, metadata: dict[str, Any]) -> dict[str, Any]:
    """Everything that a user chose that determines latents (design section 6)."""
    images = job.images.model_dump(mode="json", include={"source", "channels", "resolution"})
    quantization = job.encode.quantization.model_dump(mode="json", exclude={"max_clip_fraction"})
    if job.encode.quantization.bits < 32:
        quantization["calibration_images"] = job.encode.calibration_images
        if job.encode.quantization.range == "auto":  # then it does not only refuse shards, it has a say in the range
            quantization["max_clip_fraction"] = job.encode.quantization.max_clip_fraction
    return {
        "field": job.field_digest,
        **{f"inner.{k}": v for k, v in metadata["inner"].items() if k != "compile"},
        **{f"images.{k}": v for k, v in images.items()},
        **{f"quantization.{k}": v for k, v in quantization.items()},
        **{f"augmentation.{k}": v for k, v in job.encode.augmentation.chosen.items()},
    }


def check_fits(images: Images, metadata: dict[str, Any], field: str) -> None:
    """Raises StorageError if the images are not of the field's resolution and channels."""
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
    latents, pixels = [], []
    rows = spread(len(split), job.encode.calibration_images)
    for start in range(0, len(rows), job.encode.batch):
        batch = split.read(rows[start : start + job.encode.batch])
        if batch.good.any():
            pixels.append(batch.images[batch.good])
            latents.append(loop.encode(as_float(pixels[-1]).to(device)).cpu())
    if not latents:
        raise StorageError(f"none of the {len(rows)} calibration images could be read")
    images_of = np.concatenate(pixels)
    return choose_quantizer(
        job.encode.quantization, loop, torch.cat(latents), lambda chosen: as_float(images_of[chosen])
    )


def _plan_rows(
    job: EncodeJob,
    rows: RowTable,
    split: str,
    quantizer: Quantizer | None,
    loop: InnerLoop,
    taken: Collection[str] = (),
    replaces: str = "",
) -> Fragment:
    return plan_fragment(
        open_location(job.functaset),
        rows,
        split=split,
        latent_shape=loop.field.config.latent_shape,
        shard_rows=job.encode.shard_rows,
        chunk_rows=job.encode.chunk_rows,
        quantizer=quantizer,
        codec=job.encode.quantization.codec,
        replaces=replaces,
        versions=environment(loop),
        taken=taken,
    )


def _groups(
    fragments: list[Fragment], size: int, readable: Collection[str] = (), standing: bool = False
) -> tuple[ShardGroup, ...]:
    return tuple(
        ShardGroup(
            fragment=fragment.id,
            split=fragment.plan.split,
            shards=tuple(shard.number for shard in shards),
            images=sum(shard.size for shard in shards),
            readable=fragment.id in readable,
            standing=standing,
        )
        for fragment in fragments
        for start in range(0, fragment.plan.shards, size)
        for shards in [fragment.shards[start : start + size]]
    )


def environment(loop: InnerLoop) -> dict[str, str]:
    """Versions of what computes and stores, device, threads, compiled or eager."""
    device = next(loop.field.parameters()).device
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {name: version(name) for name in ("torch", "numpy", "zarr")} | {
        "device": named,
        "threads": str(torch.get_num_threads()),
        "mode": "compiled" if loop.compiled else "eager",
    }
