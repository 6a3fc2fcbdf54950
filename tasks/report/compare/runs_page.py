"""The page of `functa compare`: what differs, headline first, and curves over each other."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

from functa.storage.errors import StorageError
from functa.tasks.report.blocks import Block, Drawing, Row, Section, Table
from functa.tasks.report.chart_style import MAX_POINTS, STYLE, log_scale, new_figure, running_mean, step_axis, to_svg
from functa.tasks.report.compare.runs import BEST, OTHER_IMAGES, Comparison, Line
from functa.tasks.report.compare.sweep_page import LINES
from functa.tasks.report.page import Page, write_page
from functa.tasks.report.sections.training import PANELS, SMOOTHED_FROM, logged
from functa.tasks.report.words import setting, short, stage_name


def write_comparison(comparison: Comparison, out: Path, command: str = "") -> None:
    """Write the page. Raises StorageError where it cannot be written."""
    title = "Comparison: " + " and ".join(run.name for run in comparison.runs)
    warnings = () if comparison.same_images else (OTHER_IMAGES,)
    page = write_page(Page(title, command, warnings=warnings), sections(comparison))
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"--out {out}: cannot be written ({error.strerror}); name a file in a folder that exists"
        ) from None


def sections(comparison: Comparison) -> list[Section]:
    """Return headline figures, settings and other figures that differ, training curves, where the runs are."""
    runs = comparison.runs
    found = [_differences(comparison)]
    curves = list[Block]()
    for stage in dict.fromkeys(stage for run in runs for stage in run.curves):
        svg = overlaid({run.name: run.curves[stage] for run in runs if stage in run.curves})
        if svg is not None:
            curves.append(Drawing(f"compare_{stage}", stage_name(stage), svg))
    if curves:
        found.append(Section("training", "Training", "", tuple(curves)))
    where = tuple((run.name, run.created, run.root) for run in runs)
    return [*found, Section("runs", "Runs", "", (Table("runs", "Where they are", ("run", "measured", "root"), where),))]


def _differences(comparison: Comparison) -> Section:
    """Headline figures, settings that differ, other figures that differ by group; equal ones are folded."""
    differing = [line for line in comparison.lines if line.differs and not line.headline]
    equal = [line for line in comparison.lines if not line.differs and not line.headline]
    headline = [line for line in comparison.lines if line.headline]
    tables = [_table(comparison, "compare_headline", "Headline figures", headline), _settings(comparison)]
    for group in dict.fromkeys(line.group for line in differing):
        lines = [line for line in differing if line.group == group]
        tables.append(_table(comparison, f"compare_{group.lower()}", group, lines))
    tables.append(_table(comparison, "compare_equal", f"Equal in all runs: {len(equal)} figures", equal, folded=True))
    about = f"{BEST} marks the best value, where one end is better. " if comparison.same_images else ""
    about += "Below the headline only what differs is shown."
    return Section("figures", "What differs", about, tuple(table for table in tables if table.rows or table.note))


def _table(comparison: Comparison, name: str, title: str, lines: Sequence[Line], folded: bool = False) -> Table:
    rows = tuple((line.name, *line.cells) for line in lines)
    return Table(name, title, ("figure", *(run.name for run in comparison.runs)), rows, folded=folded)


def _settings(comparison: Comparison) -> Table:
    rows = tuple((key, *map(setting, values)) for key, values in comparison.settings.items())
    names = tuple(run.name for run in comparison.runs)
    return Table("config", "Config keys that differ", ("key", *names), rows, "" if rows else "No config key differs.")


def overlaid(curves: Mapping[str, Sequence[Row]]) -> bytes | None:
    """Draw a stage's curves, by the runs' names: loss, PSNR and accuracy; None where nothing was logged."""
    panels = []
    for title, words in PANELS:
        by_run = {name: logged(rows, words) for name, rows in curves.items()}
        for key in dict.fromkeys(key for series in by_run.values() for key in series):
            panels.append((title, key, {name: series[key] for name, series in by_run.items() if key in series}))
    if not panels:
        return None
    styles = dict(zip(curves, (LINES[index % len(LINES)] for index in range(len(curves)))))
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
            step_axis(axis)
            if title == "loss" and all((values > 0).all() for _, values in lines.values()):
                log_scale(axis, np.concatenate([values for _, values in lines.values()]))
        axes[-1].set_xlabel("step")
        handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
        figure.legend(handles.values(), handles.keys(), loc="outside upper left", handlelength=3)
        return to_svg(figure)
