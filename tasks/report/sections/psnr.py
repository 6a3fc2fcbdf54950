"""How test images' PSNR is spread, the worst and the best of them, and what inner steps and bits make of it."""

import math
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.ticker import MaxNLocator

from functa.tasks.report import pixels
from functa.tasks.report.blocks import Block, Drawing, Pictures, ReportData, Section, Sheet
from functa.tasks.report.charts import BLUE, GREEN, INK, PAPER, PURPLE, STYLE, VERMILION, is_number, new_figure, to_svg
from functa.tasks.report.sections import compression
from functa.tasks.report.words import number


def section(data: ReportData) -> Section | None:
    """Histogram beside the linear baselines, PSNR by inner step and by bits (Fig. 11), worst and best images."""
    histogram = None if data.psnr_per_image is None else psnr_histogram(data.psnr_per_image, baselines(data))
    by_bits = data.metrics.get("psnr_by_bits")
    bits = psnr_by_bits(by_bits) if isinstance(by_bits, dict) else None
    blocks: list[Block] = []
    if histogram is not None:
        note = "Dashed and dotted: what a linear model reaches with as many numbers." if baselines(data) else ""
        blocks.append(Drawing("psnr_histogram", "Test images by PSNR", histogram, note))
    blocks += _by_step(data.metrics)
    if bits is not None:
        blocks.append(Drawing("psnr_by_bits", "PSNR by bits", bits, "Each latent number stored in so many bits."))
    arrays = data.arrays.get("reconstruction", {})
    blocks += [sheet for kind in ("worst", "best") if (sheet := _extremes(kind, arrays)) is not None]
    return Section("psnr", "PSNR", "", tuple(blocks)) if blocks else None


def baselines(data: ReportData) -> dict[str, float]:
    """The linear baselines that were measured, by name, in dB."""
    named = {"patch PCA": "psnr_pca_patch", "whole-image PCA": "psnr_pca_image"}
    values = {name: number(data.metrics, key) for name, key in named.items()}
    return {name: value for name, value in values.items() if value is not None}


def _by_step(metrics: dict[str, Any]) -> list[Drawing]:
    measured, counts = metrics.get("psnr_by_step"), metrics.get("psnr_images")
    if not isinstance(measured, dict) or not isinstance(measured.get("test"), dict):
        return []
    names = {"test": "test images", "train": "training images"}
    curves = {name: list(measured[split].values()) for split, name in names.items() if split in measured}
    note = "Latents before quantisation, decoded before the first inner step and after each."
    some = counts.get("by_step") if isinstance(counts, dict) else None
    if isinstance(some, dict):
        told = [f"{some[split]:,} {name}" for split, name in names.items() if split in some and split in measured]
        note += f" Of {' and '.join(told)}, spread over all." if told else ""
    return [Drawing("psnr_by_step", "PSNR by inner step", compression.psnr_by_step(curves), note)]


def _extremes(kind: str, arrays: dict[str, np.ndarray]) -> Sheet | None:
    """The images of lowest or highest PSNR, their reconstructions and errors."""
    originals, reconstructions = arrays.get(f"{kind}_originals"), arrays.get(f"{kind}_reconstructions")
    psnr = arrays.get(f"{kind}_psnr")
    if originals is None or reconstructions is None or psnr is None:
        return None
    factor = pixels.amplification(originals, reconstructions)
    rows = (
        Pictures("original", originals),
        Pictures("reconstruction", reconstructions),
        Pictures(
            f"error \u00d7 {factor}, and PSNR in dB",
            pixels.errors(originals, reconstructions, factor),
            tuple(f"{value:.1f}" for value in psnr),
        ),
    )
    title = {"worst": "Worst test images", "best": "Best test images"}[kind]
    return Sheet(f"reconstructions_{kind}", title, rows, "By PSNR of the stored latents.")


def psnr_histogram(psnr: npt.ArrayLike, baselines: Mapping[str, float]) -> bytes | None:
    """How test images' PSNR, [m] in dB, is spread; the mean and the linear baselines are marked lines."""
    values = np.asarray(psnr, dtype=np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = new_figure(1, height=2.9)
        bins = min(40, max(5, round(math.sqrt(len(values)))))
        axis.hist(values, bins=bins, color=BLUE, alpha=0.55, edgecolor=PAPER, linewidth=0.4)
        mean = float(values.mean())
        axis.axvline(mean, color=INK, linewidth=2, label=f"mean {mean:.1f} dB")
        styles = ((VERMILION, "--"), (GREEN, ":"), (PURPLE, "-."))
        for (name, value), (colour, style) in zip(baselines.items(), styles, strict=False):
            axis.axvline(value, color=colour, linestyle=style, linewidth=2.2, label=f"{name} {value:.1f} dB")
        axis.set(xlabel="PSNR of an image, dB", ylabel="test images")
        axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.grid(axis="x", visible=False)
        figure.legend(loc="outside upper left", ncols=2, columnspacing=1.2, handlelength=2.2)
        return to_svg(figure)


def psnr_by_bits(by_bits: Mapping[str, Any]) -> bytes | None:
    """Test PSNR after storing each latent number in so many bits (Fig. 11); None with fewer than two."""
    known = {int(bits): float(value) for bits, value in by_bits.items() if str(bits).isdigit() and is_number(value)}
    if len(known) < 2:
        return None
    bits = sorted(known)
    places, values = np.arange(len(bits)), [known[b] for b in bits]
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = new_figure(1)
        axis.plot(places, values, color=BLUE, marker="o", linewidth=2)
        for place, value in zip(places, values, strict=True):
            axis.annotate(f"{value:.1f}", (place, value), (-3, 6), textcoords="offset points", ha="right", fontsize=9)
        axis.set_xticks(places, ["float32" if b == 32 else str(b) for b in bits])
        axis.set(xlabel="bits per latent number", ylabel="test PSNR, dB")
        axis.grid(axis="x", visible=False)
        axis.margins(x=0.12, y=0.2)
        return to_svg(figure)
