"""Estimate what feeds a run: images a second and cores for each device, sampling, the functaset's objects and requests.

The constants were measured; docs/explanation/scale.md gives the tables, and how costs grow.
"""

from collections.abc import Mapping
from typing import Any

from functa.flows.config.schema import PipelineConfig
from functa.models.field.cost import encode_passes, forward_flops, outer_flops
from functa.models.latents.cost import Cost

# Seconds of a core (AMD EPYC, a virtual machine with 2 of them) for an image that is decoded or augmented: 5,500 a
# second of 32x32 pixels, 270 of 500x375 made to 256x256. Of an array as it is: 79,700 a second of 32x32.
DECODE_IMAGE, DECODE_PIXEL, ARRAY_PIXEL = 1.26e-4, 5.5e-8, 1.2e-8

FAST = 2.1  # how many times as many images the fast decoder makes, of 500x375 to 256x256

# Seconds of that core for a number of a latent that a training reads: 6,500 rows a second of 16x16x128.
READ_NUMBER = 4.7e-9

# What one H100 reaches in FLOP/s, of this project's field on 32x32 images in bf16 (docs/results.md, "On a GPU").
H100 = {"meta_train": 58.4e12, "encode": 93.2e12}

OBJECTS = 9  # of a shard: seven arrays, its receipt and its table of rows, each created by one request

LIST_KEYS = 1000  # of files that one request lists; tars and tables are few


def field_flops(config: PipelineConfig, resolution: int, channels: int) -> dict[str, float]:
    """Return the FLOPs of one image by stage: of a step of meta-training, and of encoding."""
    field, inner, sides = config.field, config.inner, (resolution, resolution)
    encoding = inner.model_copy(update={"steps": config.encode.steps or inner.steps})
    return {
        "meta_train": outer_flops(field, inner, sides, channels, config.meta_train.patches_per_image),
        "encode": encode_passes(encoding) * forward_flops(field, sides, channels),
    }


def feed(
    config: PipelineConfig, resolution: int, channels: int, costs: Mapping[str, Cost], reached: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """Return {stage: {images_per_s, cores}}: what keeps a device busy, and the cores that read so much for it.

    costs: of the models of latents, by stage. reached: the FLOP/s of a device, by stage; others are left out.
    """
    flops = {**field_flops(config, resolution, channels), **{stage: 3 * cost.flops for stage, cost in costs.items()}}
    found = {}
    for stage in (stage for stage in flops if stage in reached):
        rate = reached[stage] / flops[stage]
        seconds = READ_NUMBER * config.field.numbers if stage in costs else _image_seconds(config, stage, resolution**2)
        found[stage] = {"images_per_s": rate, "cores": rate * seconds}
    return found


def _image_seconds(config: PipelineConfig, stage: str, pixels: int) -> float:
    """Return the seconds of a core that one image takes until a device has it."""
    augmented = stage == "encode" and config.encode.augmentation.count > 0
    if config.images.source in ("npz", "digits", "torchvision") and not augmented:
        return ARRAY_PIXEL * pixels
    exact = DECODE_IMAGE + DECODE_PIXEL * pixels
    return exact / FAST if config.images.decoder == "fast" else exact


def sampling_flops(config: PipelineConfig, denoiser: Cost, resolution: int, channels: int) -> int:
    """Return the FLOPs of drawing and decoding the samples that the evaluation judges."""
    if config.diffusion is None:
        return 0
    process = config.diffusion.process
    halves = 2 if process.conditional and process.guidance not in (0, 1) else 1  # with and without the label
    decoded = forward_flops(config.field, (resolution, resolution), channels)
    return config.evaluation.samples * (process.calls * halves * denoiser.flops + decoded)


def requests(config: PipelineConfig, images: Mapping[str, int]) -> dict[str, Any]:
    """Return {rows, shards, objects, list, read} of encoding so many images of each split.

    objects: that the functaset gets, each by one request. list and read: requests for images in a bucket.
    """
    views = {"train": 1 + config.encode.augmentation.count, "test": 1}
    rows = {split: views[split] * count for split, count in images.items()}
    shards = sum(-(-count // config.encode.shard_rows) for count in rows.values())
    total = sum(images.values())
    return {
        "rows": sum(rows.values()),
        "shards": shards,
        "objects": OBJECTS * shards,
        "list": -(-total // LIST_KEYS) if config.images.source == "folder" else 1,
        "read": total,
    }
