"""`functa presets` and `functa show`: what a config is made of, what it will cost."""

from typing import Any

from rich.console import Console
from rich.table import Table

from functa.flows.config.consistency import latent_surplus
from functa.flows.config.digests import digest, stage_config, stages_of
from functa.flows.config.estimate import estimate, image_shape, parameters, training_flops
from functa.flows.config.schema import PipelineConfig, ProvenanceConfig
from functa.tasks.config import MEMORY_BYTES


def describe_run(config: PipelineConfig) -> dict[str, Any]:
    """{config, digests{}, parameters, estimate, warnings[]}.

    estimate{flops, memory_bytes, store_bytes} as estimate tells, training_flops{classifier, denoiser}.
    """
    resolution, channels, classes = image_shape(config)
    warning = latent_surplus(config.field, resolution, channels)
    return {
        "config": config.model_dump(mode="json"),
        "digests": {stage: digest(stage_config(config, stage)) for stage in stages_of(config)},
        "parameters": parameters(config, resolution, channels, classes),
        "estimate": estimate(config, resolution, channels) | {"training_flops": training_flops(config, classes)},
        "warnings": [] if warning is None else [warning],
    }


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
