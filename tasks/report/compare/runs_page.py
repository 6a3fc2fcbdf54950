"""The report of `functa compare`: figures side by side, curves over each other, config keys that differ."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator

from functa.storage.errors import StorageError
from functa.tasks.report.blocks import Block, Drawing, Row, Section, Table
from functa.tasks.report.charts import (
    MAX_POINTS,
    PANELS,
    SMOOTHED_FROM,
    STYLE,
    log_scale,
    logged,
    new_figure,
    running_mean,
    to_svg,
)
from functa.tasks.report.compare.runs import Comparison
from functa.tasks.report.compare.sweep_page import LINES
from functa.tasks.report.page import write_page
from functa.tasks.report.words import short, show, stage_name

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
        svg = overlaid({run.name: run.curves[stage] for run in runs if stage in run.curves})
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


def overlaid(curves: Mapping[str, Sequence[Row]]) -> bytes | None:
    """SVG of a stage's curves, by the runs' names: loss, PSNR and accuracy; None where nothing was logged."""
    panels = []
    for title, words in PANELS:
        by_run = {name: logged(rows, words) for name, rows in curves.items()}
        for key in dict.fromkeys(key for series in by_run.values() for key in series):
            panels.append((title, key, {name: series[key] for name, series in by_run.items() if key in series}))
    if not panels:
        return None
    styles = dict(zip(curves, (LINES[place % len(LINES)] for place in range(len(curves)))))
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(len(panels))
        for axis, (title, key, lines) in zip(axes, panels, strict=True):
            for name, (steps, values) in lines.items():
                values = 100 * values if title.endswith("%") else values
                values = running_mean(values, max(3, len(values) // 40)) if len(values) >= SMOOTHED_FROM else values
                colour, style, marker = styles[name]
                every = -(-len(steps) // MAX_POINTS)
                axis.plot(
                    steps[::every], values[::every], color=colour, linestyle=style, marker=marker, markersize=4,
                    markevery=max(1, len(steps[::every]) // 8), linewidth=1.6, label=short(name, 40),
                )  # fmt: skip
            axis.set_title(short(f"{title} ({key})" if key not in title else title, 48))
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
            if title == "loss" and all((values > 0).all() for _, values in lines.values()):
                log_scale(axis, np.concatenate([values for _, values in lines.values()]))
        axes[-1].set_xlabel("step")
        handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
        figure.legend(handles.values(), handles.keys(), loc="outside upper left", handlelength=3)
        return to_svg(figure)
