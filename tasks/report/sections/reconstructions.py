"""Test images beside their reconstructions and errors: some spread over all, the best and the worst."""

from collections.abc import Sequence

import numpy as np

from functa.tasks.report import pixels
from functa.tasks.report.blocks import Pictures, Pixels, ReportData, Section, Sheet

KINDS = {"best": "The best test images", "worst": "The worst test images"}


def section(data: ReportData) -> Section:
    """Show every triple with errors enlarged by one factor, so that they can be compared."""
    shown = _triples(data)
    if not shown:
        return Section("reconstructions", "Reconstructions", "No reconstructions were made.", ())
    originals, images = (np.concatenate([each[kind] for each in shown]) for kind in (2, 3))
    factor = pixels.amplification(originals, images)
    about = (
        f"Errors are absolute differences, drawn {factor} times as bright as they are, in every strip below; "
        "black is none. Below each: its PSNR in dB."
    )
    sheets = tuple(_sheet(*each, factor) for each in shown)
    return Section("reconstructions", "Reconstructions", about, sheets)


def _triples(data: ReportData) -> list[tuple[str, str, Pixels, Pixels, Sequence[float]]]:
    """Return (file, title, originals, reconstructions, PSNR of each) of every sheet that the run has.

    With few test images no sheet repeats another: the worst alone, and neither where all are shown anyway.
    """
    found: list[tuple[str, str, Pixels, Pixels, Sequence[float]]] = []
    if data.originals is not None and data.reconstructions is not None and len(data.originals):
        psnr = pixels.psnr(data.originals, data.reconstructions).tolist()
        every = data.psnr_per_image is not None and len(data.originals) >= len(data.psnr_per_image)
        heading = "All test images" if every else "Test images, evenly spaced in the split"
        found.append(("reconstructions", heading, data.originals, data.reconstructions, psnr))
        if every:
            return found
    arrays = data.arrays.get("reconstruction", {})
    shown = sum(len(arrays.get(f"{kind}_psnr", ())) for kind in KINDS)
    overlap = data.psnr_per_image is not None and shown > len(data.psnr_per_image)
    for kind, heading in KINDS.items():
        if f"{kind}_psnr" in arrays and not (overlap and kind == "best"):
            originals, images = arrays[f"{kind}_originals"], arrays[f"{kind}_reconstructions"]
            found.append((f"reconstructions_{kind}", heading, originals, images, arrays[f"{kind}_psnr"].tolist()))
    return found


def _sheet(name: str, heading: str, originals: Pixels, images: Pixels, psnr: Sequence[float], factor: int) -> Sheet:
    decibels = tuple(f"{value:.1f}" if np.isfinite(value) and value < 1000 else "\u221e" for value in psnr)
    rows = (
        Pictures("original", originals),
        Pictures("reconstruction", images),
        Pictures(f"error \u00d7 {factor}", pixels.errors(originals, images, factor), decibels),
    )
    return Sheet(name, heading, rows)
