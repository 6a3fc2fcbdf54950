"""`functa presets` and `functa show`: what a config is made of, what it will cost."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from flows.config import PipelineConfig, ProvenanceConfig, digest, stage_config, stages_of
from flows.fit import ImageShape, known_images, latent_surplus
from models.cost import checkpoints, encode_passes, forward_flops, outer_flops, outer_memory, parameter_count
from storage.errors import StorageError
from storage.images import Images, open_images
from tasks.config import MEMORY_BYTES
from tasks.dispatch import threads_of_a_run

TABLE_WIDTH = 112


def describe_preset(config: PipelineConfig) -> dict[str, Any]:
    """{name, latent, stages[], parameters{field, classifier, denoiser}, paper{}}."""
    return {
        "name": config.name,
        "latent": "x".join(map(str, config.field.latent_shape)),
        "stages": list(stages_of(config)),
        "parameters": parameters(config, *_image_shape(config)),
        "paper": config.paper,
    }


def describe_run(config: PipelineConfig) -> dict[str, Any]:
    """{config, digests{}, parameters, estimate, warnings[]}.

    estimate{flops, memory_bytes, store_bytes} as _estimate tells, training_flops{classifier, denoiser}.
    """
    resolution, channels, classes = _image_shape(config)
    warning = latent_surplus(config.field, resolution, channels)
    return {
        "config": config.model_dump(mode="json"),
        "digests": {stage: digest(stage_config(config, stage)) for stage in stages_of(config)},
        "parameters": parameters(config, resolution, channels, classes),
        "estimate": _estimate(config, resolution, channels) | {"training_flops": training_flops(config, classes)},
        "warnings": [] if warning is None else [warning],
    }


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
    from models.classifier import build_classifier
    from models.denoiser import build_denoiser

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

    from models.flops import forward_flops as network_flops

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


def _image_shape(config: PipelineConfig) -> ImageShape:
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


def _estimate(config: PipelineConfig, resolution: int | None, channels: int | None) -> dict[str, Any]:
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
    from models.compilation import should_compile
    from tasks.training.device import choose_device

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


# Keys of a preset's `paper` mapping, and how the table heads them.
PAPER_FIGURES = {"psnr": "PSNR", "top1": "top-1", "fid_uncond": "FID", "fid_cond": "FID cond."}


def print_presets(described: list[dict[str, Any]]) -> None:
    """A table whose names can be copied, whatever the terminal's width; the last four columns are the paper's figures.

    PSNR in dB, top-1 in per cent, FID of unconditional and of conditional samples.
    """
    table = Table(box=None, pad_edge=False)
    for heading in ("preset", "latent", "field", "classifier", "denoiser", *PAPER_FIGURES.values()):
        table.add_column(heading, no_wrap=True, justify="left" if heading == "preset" else "right")
    for preset in described:
        counts = _counts(preset["parameters"], preset["stages"]).values()
        figures = (str(preset["paper"].get(key, "")) for key in PAPER_FIGURES)
        table.add_row(preset["name"], preset["latent"], *counts, *figures)
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    console.print(table)


def print_run(described: dict[str, Any]) -> None:
    """The config section by section with each key's provenance, then counts, estimate, warnings and digests."""
    console = Console()
    config = dict(described["config"])
    marks = ProvenanceConfig.model_validate(config.pop("provenance"))
    for section, value in config.items():
        if isinstance(value, dict):
            table = Table(title=section, show_header=False, title_justify="left")
            for key, item in value.items():
                _add_rows(table, f"{section}.", key, item, marks)
            console.print(table)
        elif value is None:
            console.print(f"{section}: none {_bracketed(marks.of(section))}\n", highlight=False, markup=False)
    _print_estimate(console, described)
    for warning in described["warnings"]:
        console.print(f"Warning: {warning}", soft_wrap=True, highlight=False, markup=False)
    console.print("Digests: " + ", ".join(f"{k} {v}" for k, v in described["digests"].items()), soft_wrap=True)


def _add_rows(table: Table, prefix: str, key: str, value: Any, marks: ProvenanceConfig) -> None:
    """One row per setting: dotted key, value, and whether it is the paper's or assumed, where the preset says so."""
    if isinstance(value, dict) and value:
        for inner, item in value.items():
            _add_rows(table, prefix, f"{key}.{inner}", item, marks)
    else:
        table.add_row(key, str(value), marks.of(prefix + key))


def _bracketed(mark: str) -> str:
    return f"({mark})" if mark else ""


def _print_estimate(console: Console, described: dict[str, Any]) -> None:
    estimate, counts = described["estimate"], described["parameters"]
    shown = _counts(counts, list(described["digests"]))
    console.print("Parameters: " + ", ".join(f"{name} {count}" for name, count in shown.items()))
    training = ", ".join(f"{name} {flops:.2e}" for name, flops in estimate["training_flops"].items())
    if training:
        console.print(f"Training on latents, FLOPs: {training}", soft_wrap=True)
    if estimate["flops"] is None:
        return
    size, processes = estimate["store_bytes"], described["config"]["dispatch"]["devices"]
    work = "Meta-training (no images to count and encode)" if size is None else "Meta-training and encoding"
    beside = f"the libraries and the images, of which up to {MEMORY_BYTES / 1e6:.0f} MB are kept"
    memory = f"about {estimate['memory_bytes'] / 1e6:.0f} MB beside {beside if size is None else 'the libraries'}"
    each = f" in each of {processes} processes" if processes > 1 else ""
    store = "" if size is None else f"; the latents take at most {size / 1e6:.1f} MB"
    console.print(f"{work}: {estimate['flops']:.2e} FLOPs, {memory}{each}{store}", soft_wrap=True)


def _counts(parameters: dict[str, int | None], stages: list[str]) -> dict[str, str]:
    """In millions; "-" for a model that the config does not have, "?" where the images must be there to know."""
    made_by = {"field": "meta_train", "classifier": "train_classifier", "denoiser": "train_diffusion"}
    unknown = {name: "?" if stage in stages else "-" for name, stage in made_by.items()}
    return {name: unknown[name] if n is None else f"{n / 1e6:.3f}M" for name, n in parameters.items()}
