"""`functa compare`: the figures and settings in which several runs differ, side by side."""

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from functa.flows.cli.arguments import Json, path_of
from functa.flows.cli.tables import foldable
from functa.flows.config.schema import ConfigError
from functa.flows.server.console import text_console

if TYPE_CHECKING:
    from functa.tasks.report.compare.runs import Comparison


def compare(
    roots: Annotated[list[str], Parameter(help="Roots of runs, or folders runs/<id> of them.")],
    /,
    *,
    out: Annotated[
        Path | None, Parameter(converter=path_of, help="Write an HTML report there: table, overlaid curves, config.")
    ] = None,
    everything: Annotated[bool, Parameter(name="--all", help="Show equal figures too.", negative="")] = False,
    as_json: Json = False,
) -> int:
    """Show the settings and figures in which runs differ, and overlay their training curves in a report."""
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
    """Print the settings that differ, then the figures that differ or all of them, the most important ones first."""
    console = text_console()
    names = [run.name for run in comparison.runs]
    if comparison.settings:
        settings = foldable("setting", *names, title="Settings that differ")
        for key, values in comparison.settings.items():
            settings.add_row(key, *("not set" if value is None else json.dumps(value) for value in values))
        console.print(settings)
    else:
        console.print("All settings are equal.")
    lines = [line for line in comparison.lines if everything or line.differs]  # the headline first
    equal = len(comparison.lines) - sum(line.differs for line in comparison.lines)
    if lines:
        table = foldable("figure", *names, title="All figures" if everything else "Figures that differ")
        for line in lines:
            table.add_row(line.name, *line.cells, style="bold" if line.differs and everything else None)
        console.print(table)
    if equal and not everything:
        console.print(f"{equal} figures are equal; --all shows them.")
