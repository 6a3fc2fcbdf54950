"""`functa show`: what a run of a config will cost on this machine, and its settings."""

import json
import math
from typing import Any

from rich.console import Console
from rich.table import Table

from functa.flows.config.consistency import latent_surplus
from functa.flows.config.demand import H100, feed, sampling_flops
from functa.flows.config.digests import digest, stage_config, stages_of
from functa.flows.config.estimate import (
    estimate,
    image_shape,
    layer_flops_per_s,
    model_costs,
    parameters,
    share_of,
    stage_seconds,
    training_flops,
)
from functa.flows.config.reference import SECTION, Setting, section_description, settings_reference
from functa.flows.config.schema import PipelineConfig, ProvenanceConfig
from functa.flows.server.console import text_console
from functa.storage.errors import StorageError
from functa.storage.images.source import listed_once
from functa.tasks.config import MEMORY_BYTES
from functa.tasks.stage_table import STAGES

# The settings that are changed most; --all shows the others.
HEADLINE = (
    "seed", "images.source", "images.location", "images.resolution", "field.spatial", "field.channels", "field.width",
    "field.depth", "inner.steps", "meta_train.steps", "meta_train.batch", "encode.quantization.bits", "classifier",
    "classifier.steps", "classifier.batch", "diffusion", "diffusion.steps", "diffusion.batch", "evaluation.samples",
    "dispatch.runner", "dispatch.device",
)  # fmt: skip

TRAINED_BY = {"field": "meta_train", "classifier": "train_classifier", "denoiser": "train_diffusion"}


def describe_run(config: PipelineConfig) -> dict[str, Any]:
    """Return {config, digests{}, parameters, estimate{}, warnings[]}.

    estimate holds flops, memory_bytes, store_bytes, training_flops{classifier, denoiser}, and by stage stage_flops and
    seconds on this machine, where a layer of the field reaches flops_per_s; see also flows/config/demand.py for
    requests, sampling_flops, and feed{here, h100}.
    """
    with listed_once():
        return _describe(config)


def _describe(config: PipelineConfig) -> dict[str, Any]:
    resolution, channels, classes = image_shape(config)
    costs = estimate(config, resolution, channels)
    costs["training_flops"] = training_flops(config, classes)
    costs["stage_flops"] |= {TRAINED_BY[name]: flops for name, flops in costs["training_flops"].items()}
    speed = layer_flops_per_s(config)
    costs["flops_per_s"] = speed
    costs["seconds"] = (
        {} if speed is None
        else {stage: stage_seconds(config, stage, work, speed) for stage, work in costs["stage_flops"].items()}
    )  # fmt: skip
    costs |= _demand(config, costs, resolution, channels, classes)
    warnings = [latent_surplus(config.field, resolution, channels), _fault_of_classes(config, classes)]
    return {
        "config": config.model_dump(mode="json"),
        "digests": {stage: digest(stage_config(config, stage)) for stage in stages_of(config)},
        "parameters": parameters(config, resolution, channels, classes),
        "estimate": costs,
        "warnings": [warning for warning in warnings if warning is not None],
    }


def _demand(
    config: PipelineConfig, costs: dict[str, Any], resolution: int | None, channels: int | None, classes: int | None
) -> dict[str, Any]:
    """Return {feed{here, h100}, sampling_flops}; empty where the images' size is unknown."""
    if resolution is None or channels is None:
        return {}
    models = model_costs(config, classes)
    by_stage = {TRAINED_BY[name]: cost for name, cost in models.items()}
    speed = costs["flops_per_s"]
    here: dict[str, float] = {}
    if speed is not None:
        work = {"meta_train": math.inf, "encode": math.inf} | costs["stage_flops"]
        here = {stage: speed * share_of(config, stage, flops) for stage, flops in work.items()}
    found: dict[str, Any] = {
        "feed": {
            "here": feed(config, resolution, channels, by_stage, here),
            "h100": feed(config, resolution, channels, {}, H100),
        }
    }
    if "denoiser" in models:
        found["sampling_flops"] = sampling_flops(config, models["denoiser"], resolution, channels)
    return found


def _fault_of_classes(config: PipelineConfig, classes: int | None) -> str | None:
    """Return why a run would be refused for its images' classes; None if it would not, or there are no images."""
    from functa.flows.config.preflight import check_classes

    try:
        if classes is not None:
            check_classes(config, "pipeline", classes)
    except StorageError as error:
        return str(error)
    return None


def print_run(described: dict[str, Any], everything: bool = False) -> None:
    """Print parameters, estimates and warnings, then the headline settings or all of them, section by section."""
    console = text_console()
    _print_estimate(console, described)
    for warning in described["warnings"]:
        console.print(f"Warning: {warning}", soft_wrap=True)
    config = described["config"]
    marks = ProvenanceConfig.model_validate(config["provenance"])
    sections: dict[str, list[tuple[Setting, Any]]] = {}
    for setting in settings_reference():
        present, value = _value(config, setting.key)
        wanted = everything or setting.key in HEADLINE
        if wanted and present and (setting.type != SECTION or value is None):
            sections.setdefault(setting.section if everything else "", []).append((setting, value))
    for section, rows in sections.items():
        console.print()
        title = (
            f"{section}: {section_description(section)}" if section else "The run" if everything else "Main settings"
        )
        console.print(_table(title, rows, marks, everything))
    console.print()
    if everything:
        console.print("Digests: " + ", ".join(f"{k} {v}" for k, v in described["digests"].items()), soft_wrap=True)
    else:
        console.print("--all shows every setting with what it accepts.")


def _value(config: dict[str, Any], key: str) -> tuple[bool, Any]:
    """Return whether a config has a key, and its value: below a section that is null there is none."""
    here: Any = config
    for part in key.split("."):
        if not isinstance(here, dict) or part not in here:
            return False, None
        here = here[part]
    return True, here


def _table(title: str, rows: list[tuple[Setting, Any]], marks: ProvenanceConfig, everything: bool) -> Table:
    """Return rows of settings; whose choice a value is only for presets that follow the paper."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", max_width=30)
    found = [marks.of(setting.key) for setting, _ in rows] if marks.paper else []
    for number, (setting, value) in enumerate(rows):
        shown = value if isinstance(value, str) and value else json.dumps(value)
        mark = [found[number]] if any(found) else []
        accepts = f" One of: {setting.type}." if everything and " | " in setting.type else ""
        table.add_row(setting.key, shown, *mark, setting.description + accepts)
    return table


def _print_estimate(console: Console, described: dict[str, Any]) -> None:
    costs, counts = described["estimate"], described["parameters"]
    models = [
        f"{name} {'unknown until the images are there' if counts[name] is None else f'{counts[name] / 1e6:.3f}M'}"
        for name, stage in TRAINED_BY.items()
        if stage in described["digests"]
    ]
    console.print(f"Parameters: {', '.join(models)}", soft_wrap=True)
    if costs["seconds"]:
        work = [f"{STAGES[stage].command} {_duration(seconds)}" for stage, seconds in costs["seconds"].items()]
        rate, flops = costs["flops_per_s"] / 1e9, sum(costs["stage_flops"].values())
        console.print(
            f"Time on this machine, roughly: {', '.join(work)}; evaluation comes on top. Counted are {flops:.2e} FLOPs "
            f"(a layer of the field was just measured to reach {rate:.3g} GFLOP/s), start-up and some for each step.",
            soft_wrap=True,
        )
    _print_feed(console, costs)
    if costs["store_bytes"] is None:
        console.print("Encoding is not counted: the images are not there.")
    else:
        _print_requests(console, costs["requests"], described["config"]["images"]["location"])
    if costs["memory_bytes"] is not None:
        _print_memory(console, costs, described["config"]["dispatch"]["devices"])


def _print_feed(console: Console, costs: dict[str, Any]) -> None:
    for device, name in (("here", "this machine's device"), ("h100", "an H100")):
        stages = [
            f"{STAGES[stage].command} {_amount(need['images_per_s'])} ({max(need['cores'], 0.1):.2g} cores)"
            for stage, need in costs.get("feed", {}).get(device, {}).items()
        ]
        if stages:
            console.print(
                f"Images/s that keep {name} busy, and cores that read them: {', '.join(stages)}", soft_wrap=True
            )
    if "sampling_flops" in costs:
        console.print(f"Samples for the evaluation: {costs['sampling_flops']:.2e} FLOPs")


def _print_requests(console: Console, requests: dict[str, int], location: str) -> None:
    written = f"The functaset: {requests['rows']:,} rows in {requests['shards']:,} shards"
    made = f"{requests['objects']:,} objects, each written by one request"
    read = f"; reading the images: {requests['list']:,} requests that list and {requests['read']:,} that read"
    console.print(f"{written}, {made}{read if '://' in location else ''}", soft_wrap=True)


def _amount(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _print_memory(console: Console, costs: dict[str, Any], processes: int) -> None:
    size = costs["store_bytes"]
    images = f" and the images, of which up to {MEMORY_BYTES / 1e6:.0f} MB are kept" if size is None else ""
    each = f" in each of {processes} processes" if processes > 1 else ""
    store = "" if size is None else f"; the latents take at most {max(size / 1e6, 0.1):.1f} MB"
    memory = f"about {costs['memory_bytes'] / 1e6:.0f} MB beside the libraries"
    console.print(f"Memory of meta-training: {memory}{images}{each}{store}", soft_wrap=True)


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.2g} {unit}" if seconds < 10 * length else f"{seconds / length:.0f} {unit}"
    return f"{max(1, round(seconds))} s"
