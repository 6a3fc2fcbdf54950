"""What `functa sweep` and `functa compare` print."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from storage.locations import open_location

if TYPE_CHECKING:
    from tasks.comparison import Comparison

DIFFERS, ABSENT = "\u2260", "\u2013"


def print_sweep(root: str) -> None:
    """Mean and sd of every setting, what a choice would be made on, and where the report is."""
    place = open_location(root)
    told = json.loads(place.read("sweep.json"))
    console = Console()
    table = _with_columns(*told["over"], *told["metrics"], title=f"{told['preset']}: sweep")
    for setting in told["settings"]:
        seeds = sum(member["values"] == setting["values"] for member in told["members"])
        figures = [_summary(setting["metrics"].get(metric), seeds) for metric in told["metrics"]]
        table.add_row(*setting["values"].values(), *figures)
    console.print(table)
    for line in told["splits"].values():
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    console.print(f"Report:  {place.uri}/report.html\nTable:   {place.uri}/sweep.csv", soft_wrap=True, highlight=False)


def _with_columns(*names: str, title: str) -> Table:
    """Headings are folded, never cut: long names may differ at their ends alone."""
    table = Table(title=title, title_justify="left")
    for name in names:
        table.add_column(name, overflow="fold")
    return table


def _summary(found: dict[str, Any] | None, seeds: int) -> str:
    """Mean and sd, and of how many seeds where some have no figure."""
    if found is None:
        return ABSENT
    count = len(found["values"])
    spread = "" if found["sd"] is None else f" \u00b1 {found['sd']:.2g}"
    return f"{found['mean']:.4g}{spread}" + (f" ({count} of {seeds})" if count < seeds else "")


def print_comparison(comparison: "Comparison", out: Path | None) -> None:
    """Every figure of every run, differences marked, and the config keys that differ."""
    console = Console()
    names = [run.name for run in comparison.runs]
    table = _with_columns("", "figure", *names, title="Figures")
    for line in comparison.lines:
        shown = [ABSENT if value is None else value for value in line.shown]
        table.add_row(DIFFERS if line.differs else "", line.name, *shown, style="bold" if line.differs else None)
    console.print(table)
    if comparison.settings:
        keys = _with_columns("key", *names, title="Config keys that differ")
        for key, values in comparison.settings.items():
            keys.add_row(key, *("not set" if value is None else json.dumps(value) for value in values))
        console.print(keys)
    else:
        console.print("No config key differs.")
    if out is not None:
        console.print(f"Report:  {out.absolute()}", soft_wrap=True, highlight=False)
