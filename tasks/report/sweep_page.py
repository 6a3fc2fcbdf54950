"""The report of a sweep: metrics over its keys, what a choice would be made on, samples side by side, every member."""

import csv
import io
from collections.abc import Callable
from typing import Any

import numpy as np

from storage.locations import Location
from tasks.report import charts_sweep
from tasks.report.blocks import Block, Drawing, Pictures, Section, Sheet, Table
from tasks.report.page import page_files, write_page
from tasks.sweep import Setting, Sweep, best, splits

MAX_SHOWN = 12  # settings whose samples are shown
SAMPLES = 8  # of each
Number = Callable[[str], float | None]
Samples = Callable[[str], dict[str, Any]]  # URI of a run's folder -> arrays samples, labels


def write_sweep(sweep: Sweep, place: Location, number: Number, samples: Samples) -> None:
    """sweep.csv, images/ and report.html below the sweep's root; charts of metrics asked for earlier are removed."""
    sections = sweep_sections(sweep, number, samples)
    place.write("sweep.csv", as_csv(*table(sweep)))
    files = {f"images/{name}": content for name, content in page_files(sections).items()}
    for name, content in files.items():
        place.write(name, content)
    for name in place.list("images/sweep_"):
        if name not in files:
            place.delete(name)
    page = write_page(f"Sweep: {sweep.preset} by {' and '.join(sweep.axes)}", sections, sweep.command, sweep.created)
    place.write("report.html", page.encode())


def sweep_sections(sweep: Sweep, number: Number, samples: Samples) -> list[Section]:
    """Results, samples where there are some, members."""
    found = [_results(sweep, number), _samples(sweep, samples), _members(sweep)]
    return [section for section in found if section is not None]


def table(sweep: Sweep) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """(columns, rows): a row for every setting, mean and sd over its seeds of every metric; None: not measured."""
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
    """Of how many seeds the figures are: 3; "2 of 3" where one has none; by metric where these differ."""
    count, found = len(setting.members), {metric: _measured(setting, metric) for metric in sweep.metrics}
    if all(each == count for each in found.values()):
        return count
    if len(set(found.values())) == 1:
        return f"{next(iter(found.values()))} of {count}"
    return ", ".join(f"{metric} {each} of {count}" for metric, each in found.items())


def _measured(setting: Setting, metric: str) -> int:
    return len(setting.summaries[metric].values) if metric in setting.summaries else 0


def as_csv(columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> bytes:
    """RFC 4180; numbers in full, what was not measured empty."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    return text.getvalue().encode()


def _results(sweep: Sweep, number: Number) -> Section:
    settings, blocks = sweep.settings, list[Block]()
    for metric in sweep.metrics:
        svg = charts_sweep.over_axes(settings, sweep.axes, metric, number)
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
    """The best setting in words, and what of it or beside it is missing."""
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
    """A setting in words: "guidance 3 with timestep_ratio 1"."""
    short = (", ".join(key.rpartition(".")[2] for key in axis.split(", ")) for axis in sweep.axes)
    return " with ".join(f"{key} {value}" for key, value in zip(short, setting.values))


def _rounded(cell: Any) -> Any:
    if cell is None:
        return "not measured"
    return float(f"{cell:.5g}") if isinstance(cell, float) else cell


def _samples(sweep: Sweep, samples: Samples) -> Section | None:
    """A row of samples for each setting, of its first seed: sample i of every row was drawn from the same noise."""
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
    note = f"{count} samples of each setting, by even steps through all: fixed seed, no selection."
    if len(sweep.settings) > MAX_SHOWN:
        note += f" The first {MAX_SHOWN} settings."
    sheet = Sheet("sweep_samples", f"By {' and '.join(sweep.axes)}", equal, note)
    return Section("samples", "Samples", "", (sheet,))


def _steps(rows: int, count: int) -> Any:
    """`count` of so many rows, the first and the last among them."""
    return np.linspace(0, rows - 1, count).round().astype(int)


def _members(sweep: Sweep) -> Section:
    rows = tuple((each.name, each.state, each.error, f"{each.root}/report.html") for each in sweep.members)
    failed = sum(each.state == "failed" for each in sweep.members)
    about = f"{failed} of {len(rows)} failed." if failed else ""
    return Section("members", "Members", about, (Table("members", "Runs", ("run", "state", "error", "report"), rows),))
