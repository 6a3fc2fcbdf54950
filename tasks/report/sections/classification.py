"""Classification: accuracy class by class, what is taken for what, and how far confidence can be trusted."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from functa.tasks.report.blocks import Block, Drawing, ReportData, Section, Table
from functa.tasks.report.chart_style import BLUE, INK, PAPER, STYLE, VERMILION, new_figure, to_svg
from functa.tasks.report.words import number, short, show

DRAWN_CLASSES = 20  # more cannot be read as a matrix

PAIRS = 20

NAMED = 5  # of the classes without images

Counts = npt.NDArray[np.int64]


def section(data: ReportData) -> Section | None:
    """Show the confusion matrix (of many classes its worst pairs), the reliability diagram, a table of classes."""
    found = data.arrays.get("classification", {})
    confusion = found.get("confusion")
    if confusion is None or confusion.ndim != 2 or not confusion.size:
        return None
    names = [data.classes[k] if k < len(data.classes) else str(k) for k in range(len(confusion))]
    blocks = [_matrix(confusion, names), _reliability(data, found), _classes(confusion, names)]
    images = int(confusion.sum())
    about = f"The latent classifier on {images:,} test images of {len(names):,} classes."
    empty = [names[k] for k in np.flatnonzero(confusion.sum(1) == 0)]
    if empty:
        more = "" if len(empty) <= NAMED else f" and {len(empty) - NAMED:,} more"
        about += f" Without test images, so without an accuracy: {', '.join(empty[:NAMED])}{more}."
    return Section("classification", "Classification", about, tuple(block for block in blocks if block is not None))


def _matrix(confusion: Counts, names: list[str]) -> Block:
    if len(names) > DRAWN_CLASSES:
        columns = ("Class", "Taken for", "Images", "Share of the class")
        rows = tuple(_pairs(confusion, names))
        return Table("confused_pairs", "Confused most", columns, rows, f"The {PAIRS} pairs with the most images.")
    note = "Per cent of each class's images (rows) that are taken for each class (columns); right ones on the diagonal."
    return Drawing("confusion", "What is taken for what", confusion_chart(confusion, names), note)


def _pairs(confusion: Counts, names: list[str]) -> list[tuple[Any, ...]]:
    wrong = confusion * ~np.eye(len(confusion), dtype=bool)
    order = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
    pairs = [(int(index) // len(names), int(index) % len(names)) for index in order]
    images = confusion.sum(1)
    return [
        (names[row], names[column], int(wrong[row, column]), show(wrong[row, column] / images[row], "share"))
        for row, column in pairs
        if wrong[row, column]
    ]


def _reliability(data: ReportData, found: dict[str, npt.NDArray[Any]]) -> Drawing | None:
    if "bin_count" not in found:
        return None
    svg = reliability(found["bin_count"], found["bin_confidence"], found["bin_accuracy"])
    error = number(data.metrics, "ece")
    note = "On the dashed line the classifier is right as often as it is sure."
    note += "" if error is None else f" Expected calibration error {show(error, 'share')}."
    return None if svg is None else Drawing("reliability", "Confidence and accuracy", svg, note)


def _classes(confusion: Counts, names: list[str]) -> Table:
    """List the worst classes first, those without images last."""
    images = confusion.sum(1)
    right = np.diag(confusion)
    accuracy = np.where(images > 0, right / np.maximum(images, 1), 2.0)
    rows = tuple(_class_row(int(k), confusion, names) for k in np.argsort(accuracy, kind="stable"))
    columns = ("Class", "Test images", "Accuracy", "Most often taken for")
    return Table("classes", "Accuracy by class", columns, rows, "The least accurate first.")


def _class_row(k: int, confusion: Counts, names: list[str]) -> tuple[Any, ...]:
    images = int(confusion[k].sum())
    if not images:
        return names[k], 0, "no test images", ""
    wrong = confusion[k].copy()
    wrong[k] = 0
    worst = int(wrong.argmax())
    worst_pair = f"{names[worst]} ({show(wrong[worst] / images, 'share')})" if wrong[worst] else "never wrong"
    return names[k], images, show(confusion[k, k] / images, "share"), worst_pair


DARKEST = 0.6  # of a cell: its number stays readable on it, on a light page and on a dark one

Values = npt.NDArray[np.floating[Any]]


def confusion_chart(counts: npt.NDArray[np.integer[Any]], names: Sequence[str]) -> bytes:
    """Draw [K, K] images by class (rows) and guess (columns): per cent of each row, as numbers and as shades."""
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
    """Draw accuracy over confidence by bin, above each bin's share of images; None without images."""
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
