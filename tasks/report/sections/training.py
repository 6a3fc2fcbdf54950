"""Training curves: loss, PSNR and accuracy over steps, as they were logged."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes

from functa.tasks.report.blocks import Drawing, ReportData, Row, Section
from functa.tasks.report.chart_style import (
    BLUE,
    GREEN,
    MAX_POINTS,
    PURPLE,
    STYLE,
    VERMILION,
    is_number,
    log_scale,
    new_figure,
    running_mean,
    step_axis,
    to_svg,
)
from functa.tasks.report.words import short, show, stage_name

Points = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]

PANELS = (("loss", ("loss",)), ("PSNR, dB", ("psnr",)), ("accuracy, %", ("accuracy", "top1")))

SMOOTHED_FROM = 40  # rows; of fewer every point is drawn

# Of a curve's last row: key, name, unit. The keys are those that functa.tasks.training logs.
LAST = (
    ("loss", "loss", "plain"), ("psnr", "PSNR", "dB"), ("accuracy", "accuracy", "share"),
    ("learning_rate", "learning rate", "plain"), ("images_per_s", "", "rate"), ("seconds", "", "duration"),
)  # fmt: skip

NAMES = {"psnr": "validation images", "psnr_train": "training batch"}  # in a legend

_STYLES = ((BLUE, "-"), (VERMILION, "--"), (GREEN, "-."), (PURPLE, ":"))


def section(data: ReportData) -> Section | None:
    """Draw the curves of every training that logged any."""
    drawings = [
        Drawing(f"curves_{_file_name(stage)}", stage_name(stage), svg, _last(rows))
        for stage, rows in data.curves.items()
        if (svg := curves(rows)) is not None
    ]
    return Section("training", "Training", "", tuple(drawings)) if drawings else None


def _last(rows: Sequence[Row]) -> str:
    last = rows[-1]
    parts = [f"{show(last['step'], 'count')} steps"] if "step" in last else []
    parts += [f"{name} {show(last[key], unit)}".strip() for key, name, unit in LAST if last.get(key) is not None]
    return "At the end: " + " \u00b7 ".join(parts)


def _file_name(stage: str) -> str:
    return "".join(letter if letter.isalnum() and letter.isascii() else "_" for letter in stage)[:64] or "stage"


def curves(rows: Sequence[Row]) -> bytes | None:
    """Draw loss (log scale) over steps and, below it, PSNR and accuracy where they were logged; None without points."""
    known = [(title, series) for title, words in PANELS for series in [logged(rows, words)] if series]
    # A figure that was measured once is in the note; its panel would be empty but for a point.
    panels = [panel for panel in known if any(len(steps) > 1 for steps, _ in panel[1].values())] or known
    if not panels:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(len(panels))
        for axis, (title, series) in zip(axes, panels, strict=True):
            _panel(axis, title, series)
        axes[-1].set_xlabel("step")
        return to_svg(figure)


def logged(rows: Sequence[Row], words: tuple[str, ...]) -> dict[str, Points]:
    """Return the logged keys with one of these words in their name, each as (steps, values) without gaps."""
    keys = dict.fromkeys(key for row in rows for key in row if any(word in key for word in words))
    series = {}
    for key in keys:
        by_step = {row["step"]: row[key] for row in rows if is_number(row.get("step")) and is_number(row.get(key))}
        if by_step:
            steps = sorted(by_step)  # a resumed run logs a step twice: the last counts
            series[key] = np.asarray(steps, np.float64), np.asarray([by_step[step] for step in steps], np.float64)
    return series


def _panel(axis: Axes, title: str, series: Mapping[str, Points]) -> None:
    percent = title.endswith("%")
    for (key, (steps, values)), (colour, style) in zip(series.items(), _STYLES, strict=False):
        values, label = 100 * values if percent else values, short(NAMES.get(key, key.replace("_", " ")), 24)
        if len(steps) < SMOOTHED_FROM:
            axis.plot(steps, values, style, color=colour, linewidth=1.8, marker="o", markersize=3, label=label)
            continue
        every = -(-len(steps) // MAX_POINTS)
        axis.plot(steps[::every], values[::every], color=colour, linewidth=0.6, alpha=0.4)
        smooth = running_mean(values, max(3, len(values) // 40))
        axis.plot(steps[::every], smooth[::every], style, color=colour, linewidth=1.8, label=label)
    axis.set_title(title)
    step_axis(axis)
    if title == "loss" and all((values > 0).all() for _, values in series.values()):
        log_scale(axis, np.concatenate([values for _, values in series.values()]))
    if len(series) > 1:
        axis.legend()
