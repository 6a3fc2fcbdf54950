"""`functa presets` and `functa show`: what a config is made of, what it will cost."""

from typing import Any

from rich.console import Console
from rich.table import Table

from flows.config import STAGES, PipelineConfig, digest, stage_config
from models.field import forward_flops, parameter_count
from storage.errors import StorageError
from storage.images import open_images
from tasks.encoding.group import ENCODE_PASSES
from tasks.training.meta_train import OUTER_PASSES

ACTIVATIONS_PER_LAYER = (
    9  # float32 tensors of a chunk that one layer leaves for the outer backward pass (3 inner steps)
)


def describe_preset(config: PipelineConfig) -> dict[str, Any]:
    """{name, latent, parameters{field, classifier, denoiser}, paper{}}."""
    return {
        "name": config.name,
        "latent": "x".join(map(str, config.field.latent_shape)),
        "parameters": parameters(config, *_image_shape(config)[1:]),
        "paper": config.paper,
    }


def describe_run(config: PipelineConfig) -> dict[str, Any]:
    """{config, digests{}, parameters, estimate{flops, memory_bytes, store_bytes}}."""
    resolution, channels, classes = _image_shape(config)
    return {
        "config": config.model_dump(mode="json"),
        "digests": {stage: digest(stage_config(config, stage)) for stage in STAGES},
        "parameters": parameters(config, channels, classes),
        "estimate": _estimate(config, resolution, channels),
    }


def parameters(config: PipelineConfig, channels: int | None, classes: int | None) -> dict[str, int | None]:
    """Parameter counts; None for what depends on images that are not there."""
    import torch

    from models.classifier import build_classifier
    from models.denoiser import build_denoiser

    counts: dict[str, int | None] = {"field": None, "classifier": None, "denoiser": None}
    if channels is not None:
        counts["field"] = parameter_count(config.field, config.inner, channels)
    shape = config.field.latent_shape
    conditional = config.diffusion.process.conditional
    with torch.device("meta"):
        if classes is not None:
            classifier = build_classifier(config.classifier.model, shape, classes)
            counts["classifier"] = sum(p.numel() for p in classifier.parameters())
        if classes is not None or not conditional:
            denoiser = build_denoiser(config.diffusion.model, shape, classes if conditional else None)
            counts["denoiser"] = sum(p.numel() for p in denoiser.parameters())
    return counts


def _image_shape(config: PipelineConfig) -> tuple[int | None, int | None, int | None]:
    """(resolution, channels, classes) from config and data set, or from the images where they must be asked."""
    known = {"digits": (8, 1, 10), "CIFAR10": (32, 3, 10), "FashionMNIST": (28, 1, 10)}
    source = config.images.source if config.images.source == "digits" else config.images.dataset
    if config.images.source in ("digits", "torchvision"):
        resolution, channels, classes = known[source]
        return config.images.resolution or resolution, config.images.channels or channels, classes
    try:
        images = open_images(config.images)
    except StorageError:
        default_channels = 3 if config.images.source == "folder" else None
        return config.images.resolution, config.images.channels or default_channels, config.images.classes
    return images.resolution, images.channels, len(images.classes)


def _estimate(config: PipelineConfig, resolution: int | None, channels: int | None) -> dict[str, Any]:
    """Of meta-training's work and memory and the functaset's size; None where images must be there to know."""
    if resolution is None or channels is None:
        return {"flops": None, "memory_bytes": None, "store_bytes": None}
    once = forward_flops(config.field, (resolution, resolution), channels)
    seen = config.meta_train.steps * config.meta_train.batch
    rows = _rows(config)
    field = config.field
    pixels = max(config.inner.chunk, (resolution // field.spatial) ** 2)
    activations = pixels * field.width * (field.depth - 1) * 4 * ACTIVATIONS_PER_LAYER
    weights = 4 * 4 * parameter_count(field, config.inner, channels)  # weights, gradient, two moments
    return {
        "flops": OUTER_PASSES * once * seen + (ENCODE_PASSES * once * rows if rows else 0),
        "memory_bytes": activations + weights,
        "store_bytes": None if rows is None else rows * field.spatial**2 * field.channels * _bits(config) // 8,
    }


def _bits(config: PipelineConfig) -> int:
    return config.encode.quantization.bits


def _rows(config: PipelineConfig) -> int | None:
    try:
        images = open_images(config.images)
    except StorageError:
        return None
    return sum(len(images.split(split)) for split in ("train", "test"))


def print_presets(described: list[dict[str, Any]]) -> None:
    """A table."""
    table = Table("preset", "latent", "field", "classifier", "denoiser", "the paper's figures")
    for preset in described:
        counts = [_millions(preset["parameters"][k]) for k in ("field", "classifier", "denoiser")]
        paper = ", ".join(f"{k} {v}" for k, v in preset["paper"].items())
        table.add_row(preset["name"], preset["latent"], *counts, paper)
    Console().print(table)


def print_run(described: dict[str, Any]) -> None:
    """The config section by section, then counts, estimate and digests."""
    console = Console()
    for section, value in described["config"].items():
        if isinstance(value, dict):
            table = Table(title=section, show_header=False, title_justify="left")
            for key, item in value.items():
                table.add_row(key, str(item))
            console.print(table)
    estimate, counts = described["estimate"], described["parameters"]
    console.print("Parameters: " + ", ".join(f"{k} {_millions(v)}" for k, v in counts.items()))
    if estimate["flops"] is not None:
        store = "?" if estimate["store_bytes"] is None else f"{estimate['store_bytes'] / 1e6:.1f} MB"
        console.print(
            f"Meta-training and encoding: {estimate['flops']:.2e} FLOPs, about {estimate['memory_bytes'] / 1e6:.0f} MB "
            f"beside the libraries; the latents take at most {store}"
        )
    console.print("Digests: " + ", ".join(f"{k} {v}" for k, v in described["digests"].items()), soft_wrap=True)


def _millions(count: int | None) -> str:
    return "?" if count is None else f"{count / 1e6:.3f}M"
