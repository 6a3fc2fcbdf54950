"""The files that a page is made of: charts as SVG, sheets of pictures as PNG, tables as CSV."""

import csv
import io
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from functa.storage.errors import printable
from functa.tasks.report import pixels
from functa.tasks.report.blocks import Block, Drawing, Pixels, Section, Sheet, Table
from functa.tasks.report.words import short

COLUMNS = 8

TILE = 0.75  # inches


def page_files(sections: Sequence[Section]) -> dict[str, bytes]:
    """Return the content of every chart, sheet and named table of the sections, by file name: runs/<id>/images/."""
    return dict(_file(block) for section in sections for block in section.blocks if block.name)


def _file(block: Block) -> tuple[str, bytes]:
    if isinstance(block, Drawing):
        return f"{block.name}.svg", block.svg
    if isinstance(block, Table):
        return f"{block.name}.csv", _csv(block)
    return f"{block.name}.png", labelled_sheet(block)


def _csv(table: Table) -> bytes:
    return as_csv([table.columns, *table.rows])


def as_csv(rows: Iterable[Sequence[Any]]) -> bytes:
    """Write RFC 4180 CSV; numbers in full, None empty. A name is no formula, which a spreadsheet would compute."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_csv_cell(cell) for cell in row] for row in rows)
    return text.getvalue().encode()


def _csv_cell(cell: Any) -> Any:
    if not isinstance(cell, str):
        return cell
    shown = printable(cell)
    return f"'{shown}" if shown.startswith(("=", "+", "-", "@")) and not _is_number(shown) else shown


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def labelled_sheet(sheet: Sheet) -> bytes:
    """Draw the sheet's rows as PNG, their labels at the left, each picture's caption below it."""
    count = max(len(row.images) for row in sheet.rows)
    columns = min(sheet.columns or COLUMNS, count)
    figure, grid = _grid(len(sheet.rows) * -(-count // columns), columns)
    for number, axes in enumerate(grid):
        row = sheet.rows[number % len(sheet.rows)]
        label = short(row.label, 40).replace(" ", "\n", 1)
        axes[0].text(
            -0.12, 0.5, label, transform=axes[0].transAxes, ha="right", va="center", fontsize=7, parse_math=False
        )
        for column, axis in enumerate(axes):
            index = number // len(sheet.rows) * columns + column
            if index < len(row.images):
                _show(axis, row.images[index])
                if index < len(row.captions):
                    _caption(axis, short(row.captions[index], 18))
    return _png(figure)


def _grid(rows: int, columns: int) -> tuple[Figure, npt.NDArray[np.object_]]:
    figure = Figure(figsize=(TILE * columns + 0.8, (TILE + 0.08) * rows + 0.2), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axis in grid.flat:
        axis.set_axis_off()
    return figure, grid


def _show(axis: Axes, image: Pixels) -> None:
    shown = image[:, :, 0] if image.shape[2] == 1 else image
    pixel_art = max(image.shape[:2]) <= pixels.PIXEL_ART
    axis.imshow(shown, cmap="gray", vmin=0, vmax=255, interpolation="nearest" if pixel_art else "antialiased")


def _caption(axis: Axes, text: str) -> None:
    # parse_math: a class may be called $\frac
    axis.text(0.5, -0.03, text, transform=axis.transAxes, ha="center", va="top", fontsize=7, parse_math=False)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"font.size": 8}):
        warnings.filterwarnings("ignore", message="Glyph")  # a label in a script that the font lacks
        figure.savefig(buffer, format="png", dpi=160, facecolor="white")
    return buffer.getvalue()
