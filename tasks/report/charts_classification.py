"""Charts of a classifier: the confusion matrix and the reliability diagram."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from tasks.report.charts import BLUE, INK, PAPER, STYLE, VERMILION, new_figure, to_svg
from tasks.report.describe import short

DARKEST = 0.6  # of a cell: its number stays readable on it, on a light page and on a dark one

Values = npt.NDArray[np.floating[Any]]


def confusion(counts: npt.NDArray[np.integer[Any]], names: Sequence[str]) -> bytes:
    """[K, K] images by class (rows) and guess (columns) -> per cent of each row, as numbers and as shades."""
    classes = len(counts)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = 9 if classes <= 10 else 6
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = new_figure(1, height=4.2)
        for row, column in np.argwhere(shares > 0):
            _cell(axis, int(row), int(column), float(shares[row, column]), size)
        labels = [short(name, 12) for name in names]
        axis.set_xticks(range(classes), labels, rotation=90 if max(map(len, labels)) > 2 else 0, fontsize=size)
        axis.set_yticks(range(classes), labels, fontsize=size)
        axis.set(xlim=(-0.5, classes - 0.5), ylim=(classes - 0.5, -0.5), aspect="equal")
        axis.set(xlabel="taken for", ylabel="class")
        axis.grid(visible=False)
        axis.tick_params(length=0)
        return to_svg(figure)


def _cell(axis: Axes, row: int, column: int, share: float, size: int) -> None:
    colour = BLUE if row == column else VERMILION  # right, and wrong off the diagonal
    alpha = DARKEST * max(0.12, share)
    axis.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=colour, alpha=alpha, edgecolor=PAPER))
    text = f"{100 * share:.0f}" if share >= 0.005 else "\u00b7"
    axis.text(column, row, text, ha="center", va="center", fontsize=size)


def reliability(count: npt.NDArray[np.integer[Any]], confidence: Values, accuracy: Values) -> bytes | None:
    """Accuracy over confidence by bin, against the diagonal, above each bin's share of images; None of no image."""
    if not count.sum():
        return None
    bins = len(count)
    middle = (np.arange(bins) + 0.5) / bins
    full = count > 0
    with matplotlib.rc_context(STYLE):
        figure, (upper, lower) = new_figure(2, height=2.4)
        upper.bar(middle[full], accuracy[full], 0.9 / bins, color=BLUE, alpha=0.55, label="accuracy")
        upper.plot(
            confidence[full], accuracy[full], "o", color=VERMILION, markersize=4, label="at the bin's mean confidence"
        )
        upper.plot([0, 1], [0, 1], color=INK, linestyle="--", linewidth=1.5, label="as accurate as confident")
        upper.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
        lower.bar(middle[full], count[full] / count.sum(), 0.9 / bins, color=BLUE, alpha=0.55)
        lower.set(xlabel="confidence", ylabel="share of images", xlim=(0, 1))
        figure.legend(*upper.get_legend_handles_labels(), loc="outside upper left", fontsize=8)
        return to_svg(figure)
