"""The report of a sweep: metrics over its keys, on which images they were measured, samples, members."""

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from functa.storage.places.location import Location
from functa.tasks.report.blocks import Block, Drawing, Pictures, Section, Sheet, Table
from functa.tasks.report.chart_style import BLUE, GREEN, INK, PURPLE, STYLE, VERMILION, new_figure, to_svg
from functa.tasks.report.compare.sweep import Setting, Summary, Sweep, best, splits
from functa.tasks.report.files import as_csv, page_files
from functa.tasks.report.page import Page, write_page
from functa.tasks.report.words import short

MAX_SHOWN = 12  # settings whose samples are shown

SAMPLES = 8  # of each

Number = Callable[[str], float | None]

Samples = Callable[[str], dict[str, Any]]  # URI of a run's folder -> arrays samples, labels


def write_sweep(sweep: Sweep, location: Location, number: Number, samples: Samples) -> None:
    """Write sweep.csv, images/ and report.html into the sweep's root; remove charts of metrics asked for earlier."""
    sections = sweep_sections(sweep, number, samples)
    columns, rows = table(sweep)
    location.write("sweep.csv", as_csv([columns, *rows]))
    files = {f"images/{name}": content for name, content in page_files(sections).items()}
    for name, content in files.items():
        location.write(name, content)
    for name in location.list("images/sweep_"):
        if name not in files:
            location.delete(name)
    title = f"Sweep: {sweep.preset} by {' and '.join(sweep.axes)}"
    page = write_page(Page(title, sweep.command, sweep.created), sections)
    location.write("report.html", page.encode())


def sweep_sections(sweep: Sweep, number: Number, samples: Samples) -> list[Section]:
    """Return results, samples where there are some, members."""
    found = [_results(sweep, number), _samples(sweep, samples), _members(sweep)]
    return [section for section in found if section is not None]


def table(sweep: Sweep) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Return columns and rows: for every setting the mean and sd over its seeds of every metric; None: not measured."""
    seeds = any(len(setting.members) > 1 for setting in sweep.settings)
    per_metric = [name for metric in sweep.metrics for name in ([metric, f"{metric} sd"] if seeds else [metric])]
    rows = []
    for setting in sweep.settings:
        row: list[Any] = [*setting.values, *([_counted(sweep, setting)] if seeds else [])]
        for metric in sweep.metrics:
            found = setting.summaries.get(metric)
            row += [None if found is None else found.mean]
            row += [None if found is None else found.sd] if seeds else []
        rows.append(tuple(row))
    return (*sweep.axes, *(["seeds"] if seeds else []), *per_metric), rows


def _counted(sweep: Sweep, setting: Setting) -> int | str:
    """Count the seeds behind the figures: 3; "2 of 3" where one has none; by metric where these differ."""
    count, found = len(setting.members), {metric: _measured(setting, metric) for metric in sweep.metrics}
    if all(each == count for each in found.values()):
        return count
    if len(set(found.values())) == 1:
        return f"{next(iter(found.values()))} of {count}"
    return ", ".join(f"{metric} {each} of {count}" for metric, each in found.items())


def _measured(setting: Setting, metric: str) -> int:
    return len(setting.summaries[metric].values) if metric in setting.summaries else 0


def _results(sweep: Sweep, number: Number) -> Section:
    settings, blocks = sweep.settings, list[Block]()
    for metric in sweep.metrics:
        svg = over_axes(settings, sweep.axes, metric, number)
        if svg is not None:
            seeds = " Mean and sd over seeds; dashes: the seeds." if sweep.seeded else ""
            note = f"{_best(sweep, metric)}{seeds}".strip()
            blocks.append(Drawing(f"sweep_{metric.replace('.', '_')}", metric, svg, note))
    columns, rows = table(sweep)
    note = f"sd over {sweep.seeded}, with n - 1." if sweep.seeded else ""
    if sweep.seeded == "training_seed":
        note += " Seeds share the functaset: figures of that alone do not vary."
    shown = tuple(tuple(_rounded(cell) for cell in row) for row in rows)
    blocks.append(Table("sweep", "Every setting", columns, shown, note))
    return Section("results", "Results", " ".join(splits(sweep).values()), tuple(blocks))


def _best(sweep: Sweep, metric: str) -> str:
    """Describe the best setting, and what is missing of it or beside it."""
    settings = sweep.settings
    found = best(settings, metric)
    if found is None:
        return ""
    summary = found.summaries[metric]
    spread = "" if summary.sd is None else f" \u00b1 {summary.sd:.2g}"
    count, seeds = len(summary.values), len(found.members)
    part = f", measured with {count} of its {seeds} seeds" if count < seeds else ""
    without = sum(metric not in each.summaries for each in settings)
    missing = f" Not measured: {without} of {len(settings)} settings." if without else ""
    return f"Best: {summary.mean:.4g}{spread}, at {named(sweep, found)}{part}.{missing}"


def named(sweep: Sweep, setting: Setting) -> str:
    """Describe a setting: "guidance 3 with timestep_ratio 1"."""
    short = (", ".join(key.rpartition(".")[2] for key in axis.split(", ")) for axis in sweep.axes)
    return " with ".join(f"{key} {value}" for key, value in zip(short, setting.values))


def _rounded(cell: Any) -> Any:
    if cell is None:
        return "not measured"
    return float(f"{cell:.5g}") if isinstance(cell, float) else cell


def _samples(sweep: Sweep, samples: Samples) -> Section | None:
    """Show samples of each setting's first seed: sample i of every row was drawn from the same noise."""
    rows: list[Pictures] = []
    for setting in sweep.settings[:MAX_SHOWN]:
        member = next((each for each in setting.members if each.run), None)
        found = samples(member.run) if member is not None else {}
        if len(found.get("samples", ())) >= 1:
            rows.append(Pictures(named(sweep, setting), found["samples"]))
    if not rows or len({row.images.shape[1:] for row in rows}) > 1:
        return None
    count = min(SAMPLES, *(len(row.images) for row in rows))
    # What a run shows is spread over its samples, by class; so are these.
    equal = tuple(Pictures(row.label, row.images[_steps(len(row.images), count)]) for row in rows)
    note = f"{count} samples of each setting, evenly spaced in the order drawn: fixed seed, no selection."
    if len(sweep.settings) > MAX_SHOWN:
        note += f" The first {MAX_SHOWN} settings."
    sheet = Sheet("sweep_samples", f"By {' and '.join(sweep.axes)}", equal, note)
    return Section("samples", "Samples", "", (sheet,))


def _steps(rows: int, count: int) -> Any:
    """Choose `count` of so many rows, the first and the last among them."""
    return np.linspace(0, rows - 1, count).round().astype(int)


def _members(sweep: Sweep) -> Section:
    rows = tuple((each.name, each.state, each.error, f"{each.root}/report.html") for each in sweep.members)
    failed = sum(each.state == "failed" for each in sweep.members)
    about = f"{failed} of {len(rows)} failed." if failed else ""
    return Section("members", "Members", about, (Table("members", "Runs", ("run", "state", "error", "report"), rows),))


LINES = tuple(
    (colour, style, marker)
    for style, markers in (("-", "os^D"), ("--", "vP*X"))
    for colour, marker in zip((BLUE, VERMILION, GREEN, PURPLE), markers)
)

LOGARITHMIC_FROM = 50.0  # largest over smallest value


def over_axes(settings: Sequence[Setting], axes: tuple[str, ...], metric: str, number: Number) -> bytes | None:
    """Draw the metric over one or two axes, or a panel of dots for each of more; None without two values.

    number: a value's number, or None where it is a word.
    """
    having = [each for each in settings if metric in each.summaries]
    if len(having) < 2:
        return None
    with matplotlib.rc_context(STYLE):
        if len(axes) > 2:
            figure, panels = new_figure(len(axes), height=1.9)
            for i, (axis, name) in enumerate(zip(panels, axes, strict=True)):
                ticks = _Ticks([each.values[i] for each in having], number)
                for each in having:
                    values = each.summaries[metric].values
                    axis.plot([ticks.position(each.values[i])] * len(values), values, "o", color=BLUE, alpha=0.6)
                _finish(axis, ticks, name, metric)
            return to_svg(figure)
        figure, (axis,) = new_figure(1, height=3.0)
        x = _horizontal(having, len(axes), number)
        ticks = _Ticks([each.values[x] for each in having], number)
        lines = list(dict.fromkeys(each.values[1 - x] for each in having)) if len(axes) == 2 else [""]
        for i, line in enumerate(lines):
            part = [each for each in having if len(axes) == 1 or each.values[1 - x] == line]
            part.sort(key=lambda each: ticks.position(each.values[x]))
            positions = [ticks.position(each.values[x]) for each in part]
            _line(axis, positions, [each.summaries[metric] for each in part], LINES[i % len(LINES)], line)
        _finish(axis, ticks, axes[x], metric)
        if len(axes) == 2:
            title = axes[1 - x].rpartition(".")[2]
            figure.legend(loc="outside upper left", ncols=min(4, len(lines)), title=short(title, 40), handlelength=2.4)
        return to_svg(figure)


def _line(
    axis: Axes, positions: Sequence[float], summaries: Sequence[Summary], look: tuple[str, str, str], name: str
) -> None:
    colour, style, marker = look
    means = [each.mean for each in summaries]
    sds = [each.sd or 0.0 for each in summaries]
    for position, each in zip(positions, summaries):
        if len(each.values) > 1:
            axis.plot([position] * len(each.values), each.values, "_", color=INK, markersize=7, zorder=4)
    axis.errorbar(
        positions, means, yerr=sds if any(sds) else None, color=colour, linestyle=style, marker=marker, markersize=5,
        linewidth=1.8, capsize=3, label=short(name, 20),
    )  # fmt: skip


class _Ticks:
    """Positions of values on an axis: numbers by size, on a log scale where they span much; words in turn."""

    def __init__(self, values: Sequence[str], number: Number) -> None:
        self.values = list(dict.fromkeys(values))
        found = [number(value) for value in self.values]
        self.numbers = [value for value in found if value is not None]
        self.numeric = len(self.numbers) == len(self.values) and all(np.isfinite(self.numbers))
        self._positions = dict(zip(self.values, self.numbers if self.numeric else range(len(self.values))))

    def position(self, value: str) -> float:
        return float(self._positions[value])

    @property
    def logarithmic(self) -> bool:
        return self.numeric and min(self.numbers) > 0 and max(self.numbers) / min(self.numbers) >= LOGARITHMIC_FROM


def _horizontal(settings: Sequence[Setting], axes: int, number: Number) -> int:
    """Choose the horizontal one of two axes: a numeric one, that of more values; the other becomes lines."""
    if axes == 1:
        return 0
    found = [_Ticks([each.values[i] for each in settings], number) for i in (0, 1)]
    return max((0, 1), key=lambda i: (found[i].numeric, len(found[i].values), -i))


def _finish(axis: Axes, ticks: _Ticks, name: str, metric: str) -> None:
    axis.set(xlabel=short(name, 48), ylabel=short(metric, 28))
    if not ticks.numeric:
        axis.set_xticks(range(len(ticks.values)), [short(value, 16) for value in ticks.values])
        axis.margins(x=0.15)
        return
    if ticks.logarithmic:
        axis.set_xscale("log")
        axis.xaxis.set_minor_locator(NullLocator())
    if len(ticks.values) <= 9:
        axis.set_xticks(sorted(ticks.numbers))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.grid(axis="x", visible=False)
