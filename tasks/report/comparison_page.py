"""The report of `functa compare`: figures side by side, curves over each other, config keys that differ."""

from pathlib import Path
from typing import Any

from storage.errors import StorageError
from tasks.comparison import Comparison
from tasks.report import charts_compare
from tasks.report.blocks import Block, Drawing, Section, Table
from tasks.report.describe import show, stage_name
from tasks.report.page import write_page

DIFFERS, ABSENT = "\u2260", "\u2013"


def write_comparison(comparison: Comparison, out: Path, command: str = "") -> None:
    """Writes the page. Raises StorageError where it cannot be written."""
    page = write_page("Comparison: " + " and ".join(run.name for run in comparison.runs), sections(comparison), command)
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"--out {out}: cannot be written ({error.strerror}); name a file in a folder that stands"
        ) from None


def sections(comparison: Comparison) -> list[Section]:
    """Runs, figures, training, config."""
    runs = comparison.runs
    where = tuple((run.name, run.created, run.root) for run in runs)
    found = [Section("runs", "Runs", "", (Table("runs", "Where they are", ("run", "measured", "root"), where),))]
    found.append(Section("figures", "Figures", f"{DIFFERS} marks what differs.", tuple(_figures(comparison))))
    curves = list[Block]()
    for stage in dict.fromkeys(stage for run in runs for stage in run.curves):
        svg = charts_compare.overlaid({run.name: run.curves[stage] for run in runs if stage in run.curves})
        if svg is not None:
            curves.append(Drawing(f"compare_{stage}", stage_name(stage), svg))
    if curves:
        found.append(Section("training", "Training", "", tuple(curves)))
    return [*found, _config(comparison)]


def _figures(comparison: Comparison) -> list[Table]:
    names = tuple(run.name for run in comparison.runs)
    tables = []
    for group in dict.fromkeys(line.group for line in comparison.lines):
        rows = tuple(
            (DIFFERS if line.differs else "", line.name, *(ABSENT if value is None else value for value in line.shown))
            for line in comparison.lines
            if line.group == group
        )
        tables.append(Table(f"compare_{group.lower()}", group, ("", "figure", *names), rows))
    return tables


def _config(comparison: Comparison) -> Section:
    names = tuple(run.name for run in comparison.runs)
    rows = tuple((key, *map(setting, values)) for key, values in comparison.settings.items())
    about = "" if rows else "No key differs."
    return Section(
        "config", "Config", about, (Table("config", "Keys that differ", ("key", *names), rows),) if rows else ()
    )


def setting(value: Any) -> str:
    """A config value as a person reads it."""
    return "not set" if value is None or value == "" else show(value, "exact")
