"""Estimate what a config costs: parameters, FLOPs, memory, bytes."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from functa.flows.config.consistency import ImageShape, known_images
from functa.flows.config.schema import PipelineConfig
from functa.models.field.cost import (
    checkpoints,
    encode_passes,
    forward_flops,
    outer_flops,
    outer_memory,
    parameter_count,
)
from functa.storage.errors import StorageError
from functa.storage.images.source import Images, open_images
from functa.tasks.config import MEMORY_BYTES
from functa.tasks.dispatch.child import threads_of_a_run


def parameters(
    config: PipelineConfig, resolution: int | None, channels: int | None, classes: int | None
) -> dict[str, int | None]:
    """Parameter counts; None for a model that the config does not have, or that depends on images not there to ask."""
    counts: dict[str, int | None] = {"field": None, "classifier": None, "denoiser": None}
    if channels is not None and (resolution is not None or config.field.coordinates != "binary"):
        sides = (resolution or config.field.spatial,) * 2  # only binary coordinates depend on them
        counts["field"] = parameter_count(config.field, config.inner, channels, sides)
    for name, network in _networks(config, classes).items():
        counts[name] = sum(p.numel() for p in network().parameters())
    return counts


def _networks(config: PipelineConfig, classes: int | None) -> dict[str, Callable[[], Any]]:
    """What builds the config's classifier and denoiser, on shapes alone; without those that must know the classes."""
    from functa.models.latents.classifier import build_classifier
    from functa.models.latents.denoiser import build_denoiser

    def on_shapes(build: Callable[..., Any], *arguments: Any) -> Any:
        import torch

        with torch.device("meta"):
            return build(*arguments)

    found: dict[str, Callable[[], Any]] = {}
    shape = config.field.latent_shape
    if config.classifier is not None and classes is not None:
        found["classifier"] = partial(on_shapes, build_classifier, config.classifier.model, shape, classes)
    if config.diffusion is not None and (classes is not None or not config.diffusion.process.conditional):
        seen = classes if config.diffusion.process.conditional else None
        found["denoiser"] = partial(on_shapes, build_denoiser, config.diffusion.model, shape, seen)
    return found


def training_flops(config: PipelineConfig, classes: int | None) -> dict[str, int]:
    """Of training the classifier and the denoiser: three forward passes an example."""
    import torch

    from functa.models.compute.flops import forward_flops as network_flops

    found = {}
    for name, network in _networks(config, classes).items():
        training = config.classifier if name == "classifier" else config.diffusion
        assert training is not None
        inputs: list[torch.Tensor | None] = [torch.empty(1, *config.field.latent_shape)]
        if name == "denoiser":
            number = torch.zeros(1, dtype=torch.int64)
            inputs += [number, number if config.diffusion.process.conditional else None]
        found[name] = 3 * network_flops(network, inputs) * training.batch * training.steps
    return found


def image_shape(config: PipelineConfig) -> ImageShape:
    """(resolution, channels, classes) from config, or from the images where only they can tell and are there.

    Where they are not, a row of the paper counts its classes: their number is for the folder to tell, so not a setting.
    """
    known = known_images(config.images)
    if None not in known:
        return known
    images = _opened(config)
    if images is not None:
        return images.resolution, images.channels, len(images.classes)
    resolution, channels, classes = known
    stated = config.paper.get("classes")
    return resolution, channels, int(stated) if classes is None and stated is not None else classes


def estimate(config: PipelineConfig, resolution: int | None, channels: int | None) -> dict[str, Any]:
    """Of meta-training's and encoding's work, of a meta-training process's memory, of the functaset's size.

    None where images must be there to know; without them the work is that of meta-training alone, and the memory
    leaves out the images that it keeps.
    """
    if resolution is None or channels is None:
        return {"flops": None, "memory_bytes": None, "store_bytes": None}
    field, inner, training, sides = config.field, config.inner, config.meta_train, (resolution, resolution)
    outer = outer_flops(field, inner, sides, channels, training.patches_per_image) * training.steps * training.batch
    images = _opened(config)
    views = {"train": 1 + config.encode.augmentation.count, "test": 1}
    rows = 0 if images is None else sum(n * len(images.split(split)) for split, n in views.items())
    part = -(-training.batch // config.dispatch.devices)  # images of a step that are one process's
    batch = min(training.micro_batch or part, part)
    cores, average = _cores(config, outer), training.ema > 0
    step = outer_memory(field, inner, sides, channels, batch, cores, average)
    return {
        "flops": round(outer + encode_passes(inner) * forward_flops(field, sides, channels) * rows),
        "memory_bytes": step + (0 if images is None else _kept_bytes(images)),
        "store_bytes": rows * field.numbers * config.encode.quantization.bits // 8 if rows else None,
    }


def _cores(config: PipelineConfig, work: float) -> int:
    """Chunks computed at once: a thread each where compiled for a CPU, shared out among training processes; else one.

    `work` is meta-training's, in FLOPs: a little is not compiled.
    """
    if config.dispatch.device == "cuda" or config.inner.compile == "off" or checkpoints(config.field, config.inner):
        return 1
    from functa.models.compute.compilation import should_compile
    from functa.models.compute.device import choose_device

    device = choose_device(config.dispatch.device)
    try:
        compiled, _ = should_compile(config.inner.compile, work, device)
    except ValueError:  # it cannot be had, which `functa doctor` and the run tell
        compiled = False
    return max(1, threads_of_a_run() // config.dispatch.devices) if compiled and device.type == "cpu" else 1


def _kept_bytes(images: Images) -> int:
    """Pixels that a meta-training process keeps: a source that is an array, and the training split where it fits."""
    training = images.split("train")
    read = 0 if training.pixels is not None else len(training) * math.prod(training.shape)
    arrays = sum(split.source.nbytes for split in images.splits.values() if split.source is not None)
    return arrays + (read if read <= MEMORY_BYTES else 0)


def _opened(config: PipelineConfig) -> Images | None:
    """The images, where they are there."""
    try:
        return open_images(config.images)
    except StorageError:
        return None
