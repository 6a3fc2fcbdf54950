"""`functa presets`: every preset with its data, size, time and purpose."""

from typing import Any

from rich.console import Console
from rich.table import Table

from functa.flows.config.digests import stages_of
from functa.flows.config.load import load_config
from functa.flows.config.presets import preset_names, read_preset
from functa.flows.config.schema import PipelineConfig
from functa.flows.server.console import text_console
from functa.storage.images.sources import known_shape
from functa.tasks.inference.ready.shipped import check_pair
from functa.tasks.inference.ready.shipped import names as shipped_names

TABLE_WIDTH = 122


def list_presets(parameters: bool) -> list[dict[str, Any]]:
    """Describe all presets; parameter counts, for which images may have to be opened, only if asked for."""
    return [describe_preset(load_config(name), parameters) for name in preset_names()]


def describe_preset(config: PipelineConfig, parameters: bool = True) -> dict[str, Any]:
    """Return {name, data, resolution, latent, time, purpose, stages[], paper{}, parameters{...}}."""
    resolution = known_shape(config.images)[0]
    described = read_preset(config.name)
    found: dict[str, Any] = {
        "name": config.name,
        "data": config.images.location or config.images.source,
        "resolution": resolution,
        "latent": "x".join(map(str, config.field.latent_shape)),
        "time": described.time,
        "purpose": described.purpose,
        "stages": list(stages_of(config)),
        "paper": config.paper,
    }
    if parameters:
        from functa.flows.config.estimate import image_shape
        from functa.flows.config.estimate import parameters as count

        found["parameters"] = count(config, *image_shape(config))
    return found


# Keys of a preset's `paper` mapping, and the headings of their columns.
PAPER_FIGURES = {"psnr": "PSNR", "top1": "top-1", "fid_uncond": "FID", "fid_cond": "FID cond."}


def print_presets(described: list[dict[str, Any]]) -> None:
    """Print two tables, our presets first; names can be copied whatever the terminal's width."""
    console = text_console()
    console.width = max(console.width, TABLE_WIDTH)
    papers = [preset for preset in described if preset["name"].startswith("paper_")]
    _print_table(console, [preset for preset in described if preset not in papers], {})
    console.print()
    console.print(
        "Rows of the paper's tables, with its figures: dB, per cent, and FID of samples drawn without and with"
    )
    console.print("labels. Times are those of a device that sustains 20 TFLOP/s.")
    console.print()
    _print_table(console, papers, PAPER_FIGURES)
    console.print()
    console.print("`functa show PRESET` prints all settings; `--set images.location=FOLDER` names the images.")


def _print_table(console: Console, presets: list[dict[str, Any]], figures: dict[str, str]) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("preset", "data", "pixels", "latent", "time", *figures.values(), "purpose"):
        right = heading in ("pixels", "latent", *figures.values())
        table.add_column(heading, no_wrap=True, justify="right" if right else "left")
    for preset in presets:
        cells = [preset["name"], preset["data"], str(preset["resolution"]), preset["latent"]]
        cells += [preset["time"].removesuffix(" at 20 TFLOP/s")]
        cells += [str(preset["paper"].get(key, "")) for key in figures]
        table.add_row(*cells, preset["purpose"])
    console.print(table)


def describe_fields(name: str | None = None) -> list[dict[str, Any]]:
    """Describe the shipped fields, or one of them: [{name, about, patch, channels, image_channels, digest, ...card}].

    Raises UnknownField, and DamagedObject for one whose files are not as they were shipped.
    """
    found = [check_pair(each) for each in (shipped_names() if name is None else [name])]
    return [
        {
            "name": record.name, "about": record.about, "patch": record.patch, "channels": record.field.channels,
            "image_channels": record.image_channels, "steps": record.inner.steps, "bytes": record.bytes,
            "digest": record.digest, **record.card.model_dump(mode="json"),
        }
        for record in found
    ]  # fmt: skip


def print_fields(described: list[dict[str, Any]], whole: bool) -> None:
    """Print a line for each field, or its whole card."""
    console = text_console()
    if whole:
        for key, value in described[0].items():
            shown = "; ".join(f"{name} {figure:g}" for name, figure in value.items()) if key == "figures" else value
            console.print(f"{key}: {shown}", soft_wrap=True, markup=False)
        return
    for each in described:
        figures = "; ".join(f"{name} {figure:g}" for name, figure in each["figures"].items())
        console.print(
            f"{each['name']}: {each['about']}{'; ' if figures else ''}{figures}", soft_wrap=True, markup=False
        )
    if not described:
        console.print("no field is shipped with this version")
