"""Charts as SVG: training curves, PSNR histogram, PSNR by bits.

Drawn for a phone's width. Colours are Okabe and Ito's, and no chart is told by colour alone. Text stays text.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from functa.tasks.report.blocks import Row
from functa.tasks.report.words import short

BLUE, VERMILION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"  # Okabe and Ito

INK, FAINT, PAPER = "#222222", "#d0d0d0", "#ffffff"

WIDTH = 4.2  # inches; with 10 point text still readable at 330 CSS pixels

SMOOTHED_FROM = 40  # rows; below that the points speak for themselves

MAX_POINTS = 1500

STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "functa", "font.family": "sans-serif", "font.size": 10,
    "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "axes.titlelocation": "left",
    "axes.grid": True, "grid.color": FAINT, "grid.linewidth": 0.5, "axes.axisbelow": True, "figure.facecolor": PAPER,
    "axes.facecolor": PAPER, "legend.frameon": False, "legend.fontsize": 9, "text.parse_math": False,
}  # fmt: skip

Points = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]


def curves(rows: Sequence[Row]) -> bytes | None:
    """Loss (log scale) over steps and, below it, PSNR and accuracy where they were logged; None without points."""
    panels = [(title, series) for title, words in PANELS for series in [logged(rows, words)] if series]
    if not panels:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(len(panels))
        for axis, (title, series) in zip(axes, panels, strict=True):
            _curve_panel(axis, title, series)
        axes[-1].set_xlabel("step")
        return to_svg(figure)


PANELS = (("loss", ("loss",)), ("PSNR, dB", ("psnr",)), ("accuracy, %", ("accuracy", "top1")))

_STYLES = ((BLUE, "-"), (VERMILION, "--"), (GREEN, "-."), (PURPLE, ":"))


def logged(rows: Sequence[Row], words: tuple[str, ...]) -> dict[str, Points]:
    """The logged keys with one of these words in their name, each as (steps, values) without gaps."""
    keys = dict.fromkeys(key for row in rows for key in row if any(word in key for word in words))
    series = {}
    for key in keys:
        by_step = {row["step"]: row[key] for row in rows if is_number(row.get("step")) and is_number(row.get(key))}
        if by_step:
            steps = sorted(by_step)  # a resumed run logs a step twice: the last counts
            series[key] = np.asarray(steps, np.float64), np.asarray([by_step[step] for step in steps], np.float64)
    return series


def _curve_panel(axis: Axes, title: str, series: Mapping[str, Points]) -> None:
    percent = title.endswith("%")
    for (key, (steps, values)), (colour, style) in zip(series.items(), _STYLES, strict=False):
        values = 100 * values if percent else values
        if len(steps) < SMOOTHED_FROM:
            axis.plot(steps, values, style, color=colour, linewidth=1.8, marker="o", markersize=3, label=short(key, 24))
            continue
        every = -(-len(steps) // MAX_POINTS)
        axis.plot(steps[::every], values[::every], color=colour, linewidth=0.6, alpha=0.4)
        smooth = running_mean(values, max(3, len(values) // 40))
        axis.plot(steps[::every], smooth[::every], style, color=colour, linewidth=1.8, label=short(key, 24))
    axis.set_title(title)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    if title == "loss" and all((values > 0).all() for _, values in series.values()):
        log_scale(axis, np.concatenate([values for _, values in series.values()]))
    if len(series) > 1:
        axis.legend()


def log_scale(axis: Axes, values: npt.NDArray[np.float64]) -> None:
    axis.set_yscale("log")
    decades = math.log10(values.max() / values.min())
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1, 3) if decades < 4 else (1,)))
    if decades < 0.5:
        axis.yaxis.set_major_locator(MaxNLocator(5))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())


def running_mean(values: npt.NDArray[np.float64], window: int) -> npt.NDArray[np.float64]:
    """Centred; the window shrinks at the ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    low, high = np.maximum(places - window // 2, 0), np.minimum(places + window // 2 + 1, len(values))
    return np.asarray((total[high] - total[low]) / (high - low), dtype=np.float64)


def new_figure(panels: int, height: float = 2.3) -> tuple[Figure, list[Axes]]:
    """A figure of a phone's width with panels below each other; to be made inside rc_context(STYLE)."""
    figure = Figure(figsize=(WIDTH, height * panels), layout="constrained")
    return figure, list(figure.subplots(panels, 1, squeeze=False)[:, 0])


def to_svg(figure: Figure) -> bytes:
    """As SVG whose text stays text; equal figures give equal bytes."""
    buffer = io.BytesIO()
    unsaid = {"Date": None, "Creator": None, "Format": None, "Type": None}  # no metadata: no addresses, equal bytes
    figure.savefig(buffer, format="svg", metadata=unsaid)
    return buffer.getvalue()


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
