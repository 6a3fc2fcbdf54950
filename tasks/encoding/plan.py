"""Plan an encoding run before any worker starts: which rows go where, and the quantiser's ranges."""

from collections.abc import Collection
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
import torch

from functa.models.compute.device import choose_device
from functa.models.config import Config, InnerConfig
from functa.models.field.inner import InnerLoop
from functa.storage.config import ImagesConfig
from functa.storage.errors import StorageError
from functa.storage.functaset.fragment import Fragment
from functa.storage.functaset.header import create_functaset
from functa.storage.functaset.history import Ranges, as_ranges, latest
from functa.storage.functaset.plan import SPLITS, RowTable, check_rows
from functa.storage.functaset.planning import plan_fragment
from functa.storage.functaset.quantizer import Quantizer
from functa.storage.images.source import Images, open_images
from functa.storage.places.address import open_location
from functa.storage.upkeep.status import bytes_left
from functa.tasks.config import EncodeConfig
from functa.tasks.encoding.changes import changes, refuse_great_loss, stored_quantizer
from functa.tasks.encoding.keyed_images import KnownImages, of_split
from functa.tasks.encoding.quantizer_choice import choose_quantizer
from functa.tasks.encoding.repair import find_damage, held_names, other_images, put_back, restore_records, wanted_rows
from functa.tasks.inputs.pictures import as_float, spread
from functa.tasks.trained import load_field

MOST_GROUPS = 500  # in one run: each is a task or a run at Prefect's server, and costs it tens of milliseconds


class EncodeJob(Config):
    """The input of every task of one encoding run: small JSON, which is sent to workers."""

    images: ImagesConfig
    encode: EncodeConfig
    field: str  # URI of the field's checkpoint
    field_digest: str
    functaset: str  # URI
    device: str
    compile: Literal["auto", "on", "off"] | None = None  # None: as the field was trained
    latents: str = ""  # URI of a functaset of the same latents at 32 bits, which need not be computed again
    retry_bad: bool = False  # encode bad rows again
    repair: bool = False  # encode damaged shards again, rather than new images
    retire_lost: bool = False  # retire the rows of missing images, however many; in a repair of changed ones too


class ShardGroup(Config):
    """Shards of one fragment that one task encodes."""

    fragment: str
    split: str
    shards: tuple[int, ...]
    images: int
    readable: bool = False  # an unreadable image fails the task instead of becoming a bad row
    frozen_ranges: bool = False  # a repair, of images that were encoded with these ranges: clipping refuses nothing

    @property
    def numbers(self) -> str:
        """Return the numbers of its shards, which are consecutive, for people."""
        return f"{self.shards[0]}" if len(self.shards) == 1 else f"{self.shards[0]} to {self.shards[-1]}"


class Planned(Config):
    """The work to distribute, and what the final commit does to existing fragments."""

    groups: tuple[ShardGroup, ...]
    fragments: tuple[str, ...]  # to make visible
    retire: dict[str, Ranges] = {}  # fragment -> rows
    drop: tuple[str, ...] = ()
    contents: dict[str, str] = {}  # fragment -> digest of the content that it must have


def plan(job: EncodeJob) -> Planned:
    """Create the functaset or open the existing one; plan a fragment per split of new images, or repairs of damage."""
    location = open_location(job.functaset)
    location.preflight_write()  # before the images are opened, which may take a while
    images = open_images(job.images)
    field, inner, metadata = load_field(job.field)
    inner = encoding_loop(inner, job.encode)
    check_fits(images, metadata, job.field)
    create_functaset(
        location,
        fingerprint=fingerprint(job, metadata),
        field={name: value.numpy() for name, value in field.state_dict().items()},
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
        retire = {fragment: rows for each in found.values() for fragment, rows in each.retire.items()}
        taken = (*newest.retired_fragments, *(entry.fragment for entry in newest.fragments))
    check_rows(location.uri, {split: len(each) for split, each in rows.items()})
    plans = []
    if any(each.keys for each in rows.values()):
        quantizer = (newest and stored_quantizer(location, newest)) or _calibrated(job, images, loop)
        plans = [
            _plan_rows(job, each, split, quantizer, loop, taken=taken) for split, each in rows.items() if each.keys
        ]
    location.preflight_write(bytes_left(location, plans))
    return Planned(
        groups=_groups(plans, job.encode.group_shards),
        fragments=tuple(each.id for each in plans),
        retire={fragment: as_ranges(rows) for fragment, rows in retire.items()},
    )


def _planned_repair(job: EncodeJob, images: Images, loop: InnerLoop) -> Planned:
    """Plan a new fragment for the rows of each damaged one, with the same quantiser."""
    location = open_location(job.functaset)
    restore_records(location)
    damage = find_damage(location)
    put_back(location, damage)
    plans, contents = [], dict[str, str]()
    wanted = wanted_rows(location, damage, job.retire_lost)
    source = KnownImages(job.images)
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
        groups=_groups(
            plans, job.encode.group_shards, {plan.id for plan in plans} - contents.keys(), frozen_ranges=True
        ),
        fragments=tuple(each.id for each in plans),
        retire={each.entry.fragment: as_ranges(each.retire) for each in wanted if each.retire},
        drop=tuple(sorted(damage.fragments)),
        contents=contents,
    )


def _source_rows(job: EncodeJob, images: Images, split: str) -> RowTable:
    """Return all rows of a split; test images are never augmented."""
    return of_split(images.split(split), job.encode.augmentation.count if split == "train" else 0)


def fingerprint(job: EncodeJob, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return everything a user chose that determines latents."""
    decisive = {name for name in ("source", "channels", "resolution", "decoder") if job.images.decides(name)}
    images = job.images.model_dump(mode="json", include=decisive)
    quantization = job.encode.quantization.model_dump(mode="json", exclude={"max_clip_fraction"})
    if job.encode.quantization.bits < 32:
        quantization["calibration_images"] = job.encode.calibration_images
        if job.encode.quantization.range == "auto":  # then it decides the range too
            quantization["max_clip_fraction"] = job.encode.quantization.max_clip_fraction
    inner = metadata["inner"] | ({} if job.encode.steps is None else {"steps": job.encode.steps})
    return {
        "field": job.field_digest,
        **{f"inner.{k}": v for k, v in inner.items() if k != "compile"},
        **{f"images.{k}": v for k, v in images.items()},
        **{f"quantization.{k}": v for k, v in quantization.items()},
        **{f"augmentation.{k}": v for k, v in job.encode.augmentation.chosen.items()},
    }


def encoding_loop(inner: InnerConfig, encode: EncodeConfig) -> InnerConfig:
    """Return the settings of the inner loop that encodes: those of the training, but for its number of steps."""
    return inner if encode.steps is None else inner.model_copy(update={"steps": encode.steps})


def check_fits(images: Images, metadata: dict[str, Any], field: str) -> None:
    """Raise StorageError if the images do not have the field's resolution and channels."""
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
            latents.append(loop.encode(as_float(pixels[-1], device)).cpu())
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
    height, width, channels = loop.field.config.latent_shape  # three: a field of images has two axes
    return plan_fragment(
        open_location(job.functaset),
        rows,
        split=split,
        latent_shape=(height, width, channels),
        shard_rows=job.encode.shard_rows,
        chunk_rows=job.encode.chunk_rows,
        quantizer=quantizer,
        codec=job.encode.quantization.codec,
        replaces=replaces,
        versions=environment(loop),
        taken=taken,
    )


def _groups(
    fragments: list[Fragment], size: int, readable: Collection[str] = (), frozen_ranges: bool = False
) -> tuple[ShardGroup, ...]:
    """Return the shards in groups of `size`, or of more where there would be more than MOST_GROUPS."""
    size = max(size, -(-sum(fragment.plan.shards for fragment in fragments) // MOST_GROUPS))
    return tuple(
        ShardGroup(
            fragment=fragment.id,
            split=fragment.plan.split,
            shards=tuple(shard.number for shard in shards),
            images=sum(shard.size for shard in shards),
            readable=fragment.id in readable,
            frozen_ranges=frozen_ranges,
        )
        for fragment in fragments
        for start in range(0, fragment.plan.shards, size)
        for shards in [fragment.shards[start : start + size]]
    )


def environment(loop: InnerLoop) -> dict[str, str]:
    """Return library versions, device, number of threads, and compiled or eager: recorded in plans and receipts."""
    device = next(loop.field.parameters()).device
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {name: version(name) for name in ("torch", "numpy", "zarr")} | {
        "device": named,
        "threads": str(torch.get_num_threads()),
        "mode": "compiled" if loop.compiled else "eager",
    }
