"""Estimate what a config costs: parameters, FLOPs, time on this machine, memory, bytes."""

import math
import time
from typing import Any

from functa.flows.config.demand import field_flops, requests
from functa.flows.config.schema import PipelineConfig
from functa.models.field.cost import (
    checkpoints,
    outer_memory,
    parameter_count,
)
from functa.models.latents.cost import Cost, classifier_cost, denoiser_cost
from functa.storage.errors import StorageError
from functa.storage.images.source import Images, open_images
from functa.storage.images.sources import ImageShape, known_shape
from functa.tasks.config import MEMORY_BYTES
from functa.tasks.dispatch.child import threads_of_a_run


def parameters(
    config: PipelineConfig, resolution: int | None, channels: int | None, classes: int | None
) -> dict[str, int | None]:
    """Return parameter counts; None for a model that the config does not have or that depends on absent images."""
    counts: dict[str, int | None] = {"field": None, "classifier": None, "denoiser": None}
    if channels is not None and (resolution is not None or config.field.coordinates != "binary"):
        sides = (resolution or config.field.spatial,) * 2  # only binary coordinates depend on them
        counts["field"] = parameter_count(config.field, config.inner, channels, sides)
    return counts | {name: cost.parameters for name, cost in model_costs(config, classes).items()}


def model_costs(config: PipelineConfig, classes: int | None) -> dict[str, Cost]:
    """Return the costs of classifier and denoiser, as far as the number of classes is known."""
    found: dict[str, Cost] = {}
    height, width, channels = config.field.latent_shape  # three: check_sections wants two axes
    shape = (height, width, channels)
    if config.classifier is not None and classes is not None:
        found["classifier"] = classifier_cost(config.classifier.model, shape, classes)
    if config.diffusion is not None and (classes is not None or not config.diffusion.process.conditional):
        seen = classes if config.diffusion.process.conditional else None
        found["denoiser"] = denoiser_cost(config.diffusion.model, shape, seen)
    return found


def training_flops(config: PipelineConfig, classes: int | None) -> dict[str, int]:
    """Return the FLOPs of training the classifier and the denoiser: three forward passes an example."""
    trainings = {"classifier": config.classifier, "denoiser": config.diffusion}
    examples = {name: each.batch * each.steps for name, each in trainings.items() if each is not None}
    return {name: 3 * cost.flops * examples[name] for name, cost in model_costs(config, classes).items()}


LAYER_ROWS = {"cpu": 1 << 12, "cuda": 1 << 18}  # pixels of the layer that is timed

LAYER_SECONDS = 0.3

# The share of a bare layer's speed that a stage reaches: 0.45 in docs/results.md (cifar10_8x8x16_fast).
SHARE = 0.5

# The share of a U-Net, and of a field in bf16 on a CPU that is not compiled, as measured on digits and photos_64 on two
# cores.
SHARE_UNET, SHARE_EAGER_BF16 = 0.35, 0.06

# Beside the arithmetic, in seconds as measured on two cores: the start of a training's process and of an encoding,
# compiling, and what every step takes however small its model.
START, START_ENCODING, COMPILING = 5.0, 2.0, 40.0

STEP = {"meta_train": 0.01, "train_classifier": 0.002, "train_diffusion": 0.002}


def layer_flops_per_s(config: PipelineConfig) -> float | None:
    """Measure the FLOP/s of one sine layer of the field on this machine's device, all its cores, within 0.3 s.

    The fastest of many passes on one core counts, since other work on the machine slows most of them. None where this
    machine does not have the device.
    """
    import torch

    from functa.models.compute.device import choose_device

    try:
        device, width = choose_device(config.dispatch.device), config.field.width
    except ValueError:
        return None
    rows, threads = LAYER_ROWS[device.type], torch.get_num_threads()
    weight, pixels = torch.randn(width, width, device=device), torch.randn(rows, width, device=device)
    fastest, end = math.inf, time.perf_counter() + LAYER_SECONDS
    torch.set_num_threads(1)
    try:
        while (begun := time.perf_counter()) < end:
            float(torch.sin(pixels @ weight)[0, 0])  # read, so that the device has finished
            fastest = min(fastest, time.perf_counter() - begun)
    finally:
        torch.set_num_threads(threads)
    return 2 * rows * width**2 / fastest * (threads if device.type == "cpu" else 1)


def image_shape(config: PipelineConfig) -> ImageShape:
    """Return (resolution, channels, classes) from config, or from the images where the config does not give them.

    Where they are not, a preset of the paper gives its number of classes, which is the folder's and so no setting.
    """
    known = known_shape(config.images)
    if None not in known:
        return known
    images = _opened(config)
    if images is not None:
        return images.resolution, images.channels, len(images.classes)
    resolution, channels, classes = known
    stated = config.paper.get("classes")
    return resolution, channels, int(stated) if classes is None and stated is not None else classes


def estimate(config: PipelineConfig, resolution: int | None, channels: int | None) -> dict[str, Any]:
    """Return {flops, stage_flops{meta_train, encode}, memory_bytes, store_bytes, requests}.

    None where neither config nor images give the images' size. Without images the work is that of meta-training
    alone, and the memory leaves out the images that a process keeps.
    """
    if resolution is None or channels is None:
        return {"flops": None, "stage_flops": {}, "memory_bytes": None, "store_bytes": None, "requests": None}
    field, inner, training, sides = config.field, config.inner, config.meta_train, (resolution, resolution)
    of_image = field_flops(config, resolution, channels)
    trained = 0 if field.pretrained else training.steps * training.batch  # images
    outer = of_image["meta_train"] * trained
    images = _opened(config)
    asked = None if images is None else requests(config, {name: len(part) for name, part in images.splits.items()})
    rows = 0 if asked is None else asked["rows"]
    encoding = of_image["encode"] * rows
    processes = config.dispatch.devices * config.dispatch.nodes
    part = -(-training.batch // processes)  # images of a step that are one process's
    batch = min(training.micro_batch or part, part)
    cores, average = _cores(config, outer, math.prod(sides)), training.ema > 0
    step = outer_memory(field, inner, sides, channels, batch, cores, average)
    return {
        "flops": round(outer + encoding),
        "stage_flops": {"meta_train": round(outer)} | ({"encode": encoding} if rows else {}),
        "memory_bytes": step + (0 if images is None else _kept_bytes(images)),
        "store_bytes": rows * field.numbers * config.encode.quantization.bits // 8 if rows else None,
        "requests": asked,
    }


def stage_seconds(config: PipelineConfig, stage: str, work: float, layer: float) -> float:
    """Return the seconds of a stage of so many FLOPs where a layer reaches `layer` FLOP/s: arithmetic and the rest."""
    if stage == "meta_train" and config.field.pretrained:
        return 0.0
    fixed = START_ENCODING if stage == "encode" else START
    if stage in ("meta_train", "encode") and _compiled_for(config, work):
        fixed += COMPILING
    steps = {
        "meta_train": config.meta_train,
        "train_classifier": config.classifier,
        "train_diffusion": config.diffusion,
    }
    training = steps.get(stage)
    fixed += 0 if training is None else STEP[stage] * training.steps
    return fixed + work / (share_of(config, stage, work) * layer)


def share_of(config: PipelineConfig, stage: str, work: float) -> float:
    """Return the share of a bare layer's FLOP/s that a stage of so many FLOPs reaches."""
    if stage in ("meta_train", "encode"):
        eager_bf16 = _compiled_for(config, work) is None and config.inner.precision == "bf16"
        return SHARE_EAGER_BF16 if eager_bf16 and config.dispatch.device != "cuda" else SHARE
    is_unet = stage == "train_diffusion" and config.diffusion is not None and config.diffusion.model.kind == "unet"
    return SHARE_UNET if is_unet else SHARE


def _compiled_for(config: PipelineConfig, work: float) -> str | None:
    """Return the type of device that so much work of the field, in FLOPs, is compiled for; None: it is not compiled."""
    from functa.models.compute.compilation import should_compile
    from functa.models.compute.device import choose_device

    try:
        device = choose_device(config.dispatch.device)
        compiled, _ = should_compile(config.inner.compile, work, device)
    except ValueError:  # there is no such device or no compiler, which `functa doctor` and the run report
        return None
    return device.type if compiled else None


def _cores(config: PipelineConfig, work: float, pixels: int) -> int:
    """Return the chunks computed at once: one per thread of a process where compiled for a CPU, else one.

    `work` is meta-training's, in FLOPs: a little is not compiled. `pixels` are those of an image.
    """
    recomputed = checkpoints(config.field, config.inner, pixels)
    if config.dispatch.device == "cuda" or config.inner.compile == "off" or recomputed:
        return 1
    return max(1, threads_of_a_run() // config.dispatch.devices) if _compiled_for(config, work) == "cpu" else 1


def _kept_bytes(images: Images) -> int:
    """Return the bytes of pixels that a meta-training process keeps: arrays, and the training split if it fits."""
    training = images.split("train")
    read = 0 if training.pixels is not None else len(training) * math.prod(training.shape)
    arrays = sum(split.source.nbytes for split in images.splits.values() if split.source is not None)
    return arrays + (read if read <= MEMORY_BYTES else 0)


def _opened(config: PipelineConfig) -> Images | None:
    """Return the images, or None where they cannot be opened."""
    try:
        return open_images(config.images)
    except StorageError:
        return None
