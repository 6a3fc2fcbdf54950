"""Shared parts of charts: style, figures of a phone's width, axes, SVG.

Colours are Okabe and Ito's, and lines differ by more than their colour. Text stays text.
"""

import io
import math
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

BLUE, VERMILION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"  # Okabe and Ito

INK, FAINT, PAPER = "#222222", "#d0d0d0", "#ffffff"

WIDTH = 4.2  # inches; with 10 point text still readable at 330 CSS pixels

MAX_POINTS = 1500

STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "functa", "font.family": "sans-serif", "font.size": 10,
    "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "axes.titlelocation": "left",
    "axes.grid": True, "grid.color": FAINT, "grid.linewidth": 0.5, "axes.axisbelow": True, "figure.facecolor": PAPER,
    "axes.facecolor": PAPER, "legend.frameon": False, "legend.fontsize": 9, "text.parse_math": False,
}  # fmt: skip

Numbers = npt.NDArray[np.float64]


def step_axis(axis: Axes) -> None:
    """Label the steps of a training."""
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))


def log_scale(axis: Axes, values: Numbers) -> None:
    """Give the vertical axis a log scale with readable ticks."""
    axis.set_yscale("log")
    decades = math.log10(values.max() / values.min())
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1, 3) if decades < 4 else (1,)))
    if decades < 0.5:
        axis.yaxis.set_major_locator(MaxNLocator(5))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())


def running_mean(values: Numbers, window: int) -> Numbers:
    """Return the centred mean; the window shrinks at the ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    rows = np.arange(len(values))
    low, high = np.maximum(rows - window // 2, 0), np.minimum(rows + window // 2 + 1, len(values))
    return np.asarray((total[high] - total[low]) / (high - low), dtype=np.float64)


def new_figure(panels: int, height: float = 2.3) -> tuple[Figure, list[Axes]]:
    """Make a figure of a phone's width with panels below each other; call it inside rc_context(STYLE)."""
    figure = Figure(figsize=(WIDTH, height * panels), layout="constrained")
    return figure, list(figure.subplots(panels, 1, squeeze=False)[:, 0])


def to_svg(figure: Figure) -> bytes:
    """Write SVG whose text stays text; equal figures give equal bytes."""
    buffer = io.BytesIO()
    left_out = {"Date": None, "Creator": None, "Format": None, "Type": None}  # no metadata: no addresses, equal bytes
    figure.savefig(buffer, format="svg", metadata=left_out)
    return buffer.getvalue()


def is_number(value: Any) -> bool:
    """Return whether this is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
