"""The run's pictures as files: every chart, and the labelled sheets of reconstructions and samples."""

import csv
import io
import warnings
from collections.abc import Sequence

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from functa.tasks.report import charts, pixels
from functa.tasks.report.blocks import Block, Drawing, Pixels, ReportData, Sheet, Table
from functa.tasks.report.sections import sections
from functa.tasks.report.words import short

COLUMNS = 8

TILE = 0.75  # inches


def draw(data: ReportData) -> dict[str, bytes]:
    """File name -> content of every picture that this data has: runs/<id>/images/."""
    drawn = {f"curves_{_file_name(stage)}.svg": charts.curves(rows) for stage, rows in data.curves.items()}
    drawn |= dict(block_file(block) for section in sections(data) for block in section.blocks)
    if data.originals is not None and data.reconstructions is not None and len(data.originals):
        drawn["reconstructions.png"] = reconstruction_sheet(data.originals, data.reconstructions)
    if data.samples is not None and len(data.samples):
        drawn["samples.png"] = sample_sheet(data.samples, data.sample_labels)
    return {name: content for name, content in drawn.items() if content is not None}


def block_file(block: Block) -> tuple[str, bytes]:
    """Name and content of the file that a block becomes."""
    if isinstance(block, Drawing):
        return f"{block.name}.svg", block.svg
    if isinstance(block, Table):
        return f"{block.name}.csv", _csv(block)
    return f"{block.name}.png", labelled_sheet(block)


def _csv(table: Table) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([table.columns, *table.rows])
    return text.getvalue().encode("utf-8", "backslashreplace")  # a lone surrogate in a name has no UTF-8


def labelled_sheet(sheet: Sheet) -> bytes:
    """PNG: the sheet's rows, their labels at the left, each picture's caption below it."""
    count = max(len(row.images) for row in sheet.rows)
    columns = min(sheet.columns or COLUMNS, count)
    figure, grid = _grid(len(sheet.rows) * -(-count // columns), columns)
    for place, axes in enumerate(grid):
        row = sheet.rows[place % len(sheet.rows)]
        label = short(row.label, 40).replace(" ", "\n", 1)
        axes[0].text(
            -0.12, 0.5, label, transform=axes[0].transAxes, ha="right", va="center", fontsize=7, parse_math=False
        )
        for column, axis in enumerate(axes):
            index = place // len(sheet.rows) * columns + column
            if index < len(row.images):
                _show(axis, row.images[index])
                if index < len(row.captions):
                    _caption(axis, short(row.captions[index], 18))
    return _png(figure)


def reconstruction_sheet(originals: Pixels, reconstructions: Pixels) -> bytes:
    """PNG: rows original / reconstruction / error, [n, H, W, C] each, with every picture's PSNR below it."""
    factor = pixels.amplification(originals, reconstructions)
    error = pixels.errors(originals, reconstructions, factor)
    decibels = pixels.psnr(originals, reconstructions)
    kinds = (("original", originals), ("recon-\nstruction", reconstructions), (f"error \u00d7{factor}", error))
    columns = min(COLUMNS, len(originals))
    blocks = -(-len(originals) // columns)
    figure, grid = _grid(3 * blocks, columns)
    for row, axes in enumerate(grid):
        name, images = kinds[row % 3]
        axes[0].text(-0.12, 0.5, name, transform=axes[0].transAxes, ha="right", va="center", fontsize=8)
        for column, axis in enumerate(axes):
            index = row // 3 * columns + column
            if index < len(images):
                _show(axis, images[index])
                if row % 3 == 2:
                    _caption(axis, f"{decibels[index]:.1f} dB")
    return _png(figure)


def sample_sheet(samples: Pixels, labels: Sequence[str] | None = None) -> bytes:
    """PNG: samples [n, H, W, C] in the order given, each with its class label below it."""
    columns = min(COLUMNS, len(samples))
    figure, grid = _grid(-(-len(samples) // columns), columns)
    for index, axis in enumerate(grid.flat[: len(samples)]):
        _show(axis, samples[index])
        if labels is not None and index < len(labels):
            _caption(axis, short(labels[index], 14))
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


def _file_name(stage: str) -> str:
    return "".join(letter if letter.isalnum() and letter.isascii() else "_" for letter in stage)[:64] or "stage"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"font.size": 8}):
        warnings.filterwarnings("ignore", message="Glyph")  # a label in a script that the font lacks
        figure.savefig(buffer, format="png", dpi=160, facecolor="white")
    return buffer.getvalue()
