"""`functa compare`: figures and settings of several runs, side by side; `functa table`: figures beside the paper's."""

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from functa.flows.cli.arguments import Json, path_of
from functa.flows.cli.presets import TABLE_WIDTH
from functa.flows.cli.tables import foldable
from functa.flows.config.schema import ConfigError
from functa.flows.server.console import text_console
from functa.tasks.dispatch.progress import count

SETTINGS = 20  # of those that differ, without --all

if TYPE_CHECKING:
    from functa.tasks.report.compare.paper import PaperRow
    from functa.tasks.report.compare.runs import Comparison


def compare(
    roots: Annotated[list[str], Parameter(help="Roots of runs, or folders runs/<id> of them.")],
    /,
    *,
    out: Annotated[
        Path | None, Parameter(converter=path_of, help="Write an HTML report there: table, overlaid curves, config.")
    ] = None,
    everything: Annotated[bool, Parameter(name="--all", help="Show every figure and setting.", negative="")] = False,
    as_json: Json = False,
) -> int:
    """Show the main figures and the settings in which runs differ; all figures and curves in a report."""
    if len(roots) < 2:
        raise ConfigError("compare needs at least two roots, such as functa compare functa-runs/a functa-runs/b")
    from functa.tasks.report.compare.runs import compare_runs, read_runs

    comparison = compare_runs(read_runs(roots))
    if out is not None:
        from functa.tasks.report.compare.runs_page import write_comparison

        command = shlex.join(["functa", *sys.argv[1:]])
        write_comparison(comparison, out, command)
    if as_json:
        print(json.dumps(comparison.as_json(), indent=1))
        return 0
    print_comparison(comparison, everything)
    if out is not None:
        text_console().print(f"Report:  {out.absolute()}", soft_wrap=True)
    return 0


def print_comparison(comparison: "Comparison", everything: bool = False) -> None:
    """Print the headline figures and the settings that differ; or all figures, and every setting that differs."""
    from functa.tasks.report.compare.runs import OTHER_IMAGES

    console = text_console()
    names = [run.name for run in comparison.runs]
    if not comparison.same_images:
        console.print(OTHER_IMAGES, soft_wrap=True)
    lines = [line for line in comparison.lines if everything or (line.headline and line.differs)]
    if lines:
        table = foldable("figure", *names, title="All figures" if everything else "Headline figures that differ")
        for line in lines:  # the headline first
            table.add_row(line.name, *line.cells, style="bold" if line.differs and everything else None)
        console.print(table)
    else:
        console.print("No headline figure differs.")
    settings = dict(list(comparison.settings.items())[: None if everything else SETTINGS])
    if settings:
        table = foldable("setting", *names, title="Settings that differ")
        for key, values in settings.items():
            table.add_row(key, *("not set" if value is None else json.dumps(value) for value in values))
        console.print(table)
    else:
        console.print("All settings are equal.")
    if not everything:
        console.print(_left_out(comparison, len(comparison.settings) - len(settings)), soft_wrap=True)


def _left_out(comparison: "Comparison", settings: int) -> str:
    """Name what is not printed, and how to see it."""
    others = sum(line.differs and not line.headline for line in comparison.lines)
    equal = sum(not line.differs for line in comparison.lines)
    more = f"{count(settings, 'setting')} and " if settings else ""
    differing = f"{more}{count(others, 'other figure')} that differ"
    return f"Not shown: {differing}, {count(equal, 'figure')} that are equal; --all shows them, --out writes a page."


def table(
    number: Annotated[Literal["1", "2", "3", "8"], Parameter(help="Number of the paper's table.")],
    roots: Annotated[list[str], Parameter(help="Roots of runs, or of sweeps of them.")],
    /,
    *,
    as_json: Json = False,
) -> int:
    """Show a table of the paper with the figures of runs beside it: the paper's, ours, the difference.

    A run belongs to the row of its latent, whatever preset it was made from. Table 8 takes the mean over seeds.
    """
    from functa.tasks.report.compare.paper import lines_of, members
    from functa.tasks.report.compare.runs import read_runs

    lines = lines_of(rows_of(number), read_runs([root for each in roots for root in members(each)]))
    if as_json:
        print(json.dumps([asdict(line) for line in lines], indent=1))
        return 0
    shown = foldable("latent", "figure", "the paper", "ours", "difference", "run", title=f"Table {number}")
    for before, line in zip([None, *lines], lines):
        shown.add_row("" if before and before.row == line.row else line.row, line.figure, *line.cells, line.run)
    console = text_console()
    console.width = max(console.width, TABLE_WIDTH)  # a figure and its unit on one line
    console.print(shown)
    return 0


def rows_of(number: str) -> list["PaperRow"]:
    """Return the rows of one of the paper's tables, from the presets of its rows."""
    from functa.flows.config.load import load_config
    from functa.flows.config.presets import preset_names, read_preset
    from functa.storage.images.sources import known_shape
    from functa.tasks.report.compare.paper import OF_BITS, PaperRow

    def row(preset: str, bits: int | None = None) -> PaperRow:
        config = load_config(preset)
        figures = {key: float(value) for key, value in config.paper.items() if key != "classes"}
        if bits is not None:
            figures = {"fid_cond": OF_BITS[bits][0]}
        field, (resolution, _, _) = config.field, known_shape(config.images)
        return PaperRow(field.latent_shape, field.interpolation, field.kernel, resolution, figures, bits)

    if number == "8":
        return [row("paper_imagenet_32x32x64", bits) for bits in OF_BITS]
    purposes = {name: read_preset(name).purpose.split() for name in preset_names() if name.startswith("paper_")}
    # Both FIDs of a row are in the preset of its unconditional samples.
    named = [name for name, words in purposes.items() if words[:2] == ["Table", number] and not name.endswith("_cond")]
    order = {name: int((purposes[name][3:] or [name.rpartition("_")[2]])[0]) for name in named}  # row, or numbers
    return [row(name) for name in sorted(named, key=order.__getitem__)]
