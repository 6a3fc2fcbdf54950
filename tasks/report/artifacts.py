"""Markdown and tables that the flows publish as Prefect artifacts; pictures are inline and small."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from functa.storage.errors import printable
from functa.tasks.report import pixels, words
from functa.tasks.report.blocks import Pixels, ReportData
from functa.tasks.report.pixels import psnr
from functa.tasks.report.run_folder import RunFolder
from functa.tasks.report.sections.provenance import lineage_table

MAX_URI = 60_000  # characters of one inline picture

MAX_SHOWN = 16

COLUMNS = 8

SIDES = (64, 48, 32)  # pixels of a tile, tried in turn until the strip is small enough

HEADLINE = ("psnr_test", "psnr_pca", "top1_test", "fd", "bits_per_dim")


def reconstruction_markdown(
    originals: Pixels, reconstructions: Pixels, psnr: npt.NDArray[np.floating[Any]] | Sequence[float]
) -> str:
    """Show originals, reconstructions and errors, [n, H, W, C], in strips of eight, with psnr [n] in dB below."""
    count = min(len(originals), MAX_SHOWN)
    if not count:
        return "## Reconstructions\n\nNo pictures.\n"
    originals, reconstructions = originals[:count], reconstructions[:count]
    factor = pixels.amplification(originals, reconstructions)
    error = pixels.errors(originals, reconstructions, factor)
    lines = ["## Reconstructions", "", f"Test images. Errors are shown \u00d7 {factor}; black is none.", ""]
    for start in range(0, count, COLUMNS):
        part = slice(start, start + COLUMNS)
        decibels = " \u00b7 ".join(f"{float(value):.1f}" for value in psnr[part])
        last = min(start + COLUMNS, count)
        for what, images in (("original", originals), ("reconstruction", reconstructions), ("error", error)):
            alt = f"{what} {start + 1} to {last}"
            lines += [f"{what} \u00d7 {factor}" if what == "error" else what, "", _picture(images[part], alt), ""]
        lines += [f"PSNR, dB, from left to right: {decibels}", ""]
    return "\n".join(lines)


def samples_markdown(samples: Pixels, labels: Sequence[str] | None = None) -> str:
    """Show samples, [n, H, W, C], in strips of eight, in the order drawn, with class labels below each strip."""
    count = min(len(samples), MAX_SHOWN)
    if not count:
        return "## Samples\n\nNo samples.\n"
    lines = ["## Samples", "", "Fixed seed, no selection.", ""]
    for start in range(0, count, COLUMNS):
        last = min(start + COLUMNS, count)
        lines += [_picture(samples[start:last], f"samples {start + 1} to {last}"), ""]
        if labels is not None:
            names = " \u00b7 ".join(_plain(str(label)) for label in labels[start:last])
            lines += [f"Classes, from left to right: {names}", ""]
    return "\n".join(lines)


def metrics_table(metrics: dict[str, Any]) -> list[dict[str, str]]:
    """Return every value of metrics.json as {metric, value, meaning}, the headline figures first."""
    return [
        {"metric": figure.name, "value": figure.value, "meaning": figure.meaning or figure.key}
        for figure in sorted(words.figures(metrics), key=lambda figure: not figure.key.startswith(HEADLINE))
    ]


def _picture(images: Pixels, alt: str) -> str:
    """Write one strip as markdown, at most MAX_URI characters."""
    for side in SIDES:
        uri = pixels.data_uri(pixels.png(pixels.strip(images, side)))
        if len(uri) < MAX_URI:
            break
    return f"![{alt}]({uri})"


# Words, numbers and punctuation that markdown takes for nothing else; not the beginning of a numbered list.
PLAIN = re.compile(r"(?!\d+[.)] )[^\W_](?:[^\W_]|[ ,.;%()/:'+=-])*")


def _plain(label: str, length: int = 40) -> str:
    """Write a name, cut to length, as markdown that shows it and does nothing else."""
    return markdown(label if len(label) <= length else label[: length - 1] + "\u2026")


def markdown(text: str) -> str:
    """Write a text as markdown that shows it and does nothing else: no link, picture, markup or new line."""
    return "".join(x if x.isalnum() or x == " " else f"&#{ord(x)};" for x in printable(text))


def cells(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a table artifact so that the UI shows their texts: its older version renders them as markdown.

    Plain words stay as they are: the newer version, and those who read the artifact by the API, see texts literally.
    """
    return [{key: _cell(cell) if isinstance(cell, str) else cell for key, cell in row.items()} for row in rows]


def _cell(text: str) -> str:
    is_plain = PLAIN.fullmatch(text) and "://" not in text and "www." not in text.lower()
    return text if is_plain else markdown(text)


def publish(data: ReportData, folder: RunFolder) -> None:
    """Create the artifacts in the current task run."""
    create_table_artifact(cells(metrics_table(data.metrics)), key="metrics", description="What was measured")
    lineage = cells(lineage_table(data.lineage))
    create_table_artifact(lineage, key="lineage", description="What was made from what, by digest")
    if data.originals is not None and data.reconstructions is not None:
        markdown = reconstruction_markdown(
            data.originals, data.reconstructions, psnr(data.originals, data.reconstructions)
        )
        create_markdown_artifact(markdown, key="reconstructions", description="Test images and their reconstructions")
    if data.samples is not None:
        markdown = samples_markdown(data.samples, data.sample_labels)
        create_markdown_artifact(markdown, key="samples", description="Uncurated samples of the diffusion model")
    create_markdown_artifact(report_markdown(folder), key="report", description="Where the whole report is")


def report_markdown(folder: RunFolder) -> str:
    """Write headline figures and where the report is."""
    headline = [
        ("PSNR, test", folder.metrics.get("psnr_test"), "{:.2f} dB"),
        ("Top-1, test", folder.metrics.get("top1_test"), "{:.1%}"),
        ("Bits per latent number", folder.metrics.get("bits_per_dim"), "{:.2f}"),
    ]
    lines = [f"- {name}: **{form.format(value)}**" for name, value, form in headline if value is not None]
    return "\n".join(["## Report", "", *lines, "", f"{markdown(folder.report_uri)} (one file, opens from disk)", ""])
