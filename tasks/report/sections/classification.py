"""How the classifier does, class by class: what it takes for what, and whether its confidence can be believed."""

from typing import Any

import numpy as np
import numpy.typing as npt

from tasks.report import charts_classification as charts
from tasks.report.blocks import Block, Drawing, Section, Table
from tasks.report.data import ReportData
from tasks.report.describe import number, show

DRAWN_CLASSES = 20  # more cannot be read as a matrix
PAIRS = 20
NAMED = 5  # of the classes without images

Counts = npt.NDArray[np.int64]


def section(data: ReportData) -> Section | None:
    """Confusion matrix (of many classes its worst pairs), reliability diagram, and a table of the classes."""
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
    return Drawing("confusion", "What is taken for what", charts.confusion(confusion, names), note)


def _pairs(confusion: Counts, names: list[str]) -> list[tuple[Any, ...]]:
    wrong = confusion * ~np.eye(len(confusion), dtype=bool)
    order = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
    places = [(int(place) // len(names), int(place) % len(names)) for place in order]
    images = confusion.sum(1)
    return [
        (names[row], names[column], int(wrong[row, column]), show(wrong[row, column] / images[row], "share"))
        for row, column in places
        if wrong[row, column]
    ]


def _reliability(data: ReportData, found: dict[str, npt.NDArray[Any]]) -> Drawing | None:
    if "bin_count" not in found:
        return None
    svg = charts.reliability(found["bin_count"], found["bin_confidence"], found["bin_accuracy"])
    error = number(data.metrics, "ece")
    note = "" if error is None else f"Expected calibration error {show(error, 'share')}."
    return None if svg is None else Drawing("reliability", "Confidence and accuracy", svg, note)


def _classes(confusion: Counts, names: list[str]) -> Table:
    """Worst classes first; those without images last."""
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
    said = f"{names[worst]} ({show(wrong[worst] / images, 'share')})" if wrong[worst] else "never wrong"
    return names[k], images, show(confusion[k, k] / images, "share"), said
