"""PSNR: how it is spread over test images, and how it grows with inner steps."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.ticker import MaxNLocator

from functa.tasks.report.blocks import Block, Drawing, ReportData, Section
from functa.tasks.report.chart_style import BLUE, GREEN, INK, PAPER, PURPLE, STYLE, VERMILION, new_figure, to_svg
from functa.tasks.report.words import number

ABOUT = "Higher is better: 10 dB more is a tenth of the squared error."


def section(data: ReportData) -> Section | None:
    """Draw a histogram beside the linear baselines, and PSNR by inner step."""
    histogram = None if data.psnr_per_image is None else psnr_histogram(data.psnr_per_image, baselines(data))
    blocks: list[Block] = []
    if histogram is not None:
        known = baselines(data)
        note = "Each image has its own PSNR; the line is their mean."
        note += " The other lines: a linear method (PCA) with as many numbers." if known else ""
        blocks.append(Drawing("psnr_histogram", "Test images by PSNR", histogram, note))
    blocks += _by_step(data.metrics)
    return Section("psnr", "PSNR", ABOUT, tuple(blocks)) if blocks else None


def baselines(data: ReportData) -> dict[str, float]:
    """Return the linear baselines that were measured, by name, in dB."""
    named = {"patch PCA": "psnr_pca_patch", "whole-image PCA": "psnr_pca_image"}
    values = {name: number(data.metrics, key) for name, key in named.items()}
    return {name: value for name, value in values.items() if value is not None}


def _by_step(metrics: dict[str, Any]) -> list[Drawing]:
    measured, counts = metrics.get("psnr_by_step"), metrics.get("psnr_images")
    if not isinstance(measured, dict) or not isinstance(measured.get("test"), dict):
        return []
    names = {"test": "test images", "train": "training images"}
    curves = {name: list(measured[split].values()) for split, name in names.items() if split in measured}
    note = "Decoded before the first gradient step on the latent and after each; before quantisation."
    some = counts.get("by_step") if isinstance(counts, dict) else None
    if isinstance(some, dict):
        counted = [f"{some[split]:,} {name}" for split, name in names.items() if split in some and split in measured]
        note += f" Measured on {' and '.join(counted)}." if counted else ""
    drawings = [Drawing("psnr_by_step", "PSNR by inner step", psnr_by_step(curves), note)]
    more = metrics.get("psnr_by_more_steps")
    if isinstance(more, dict) and len(more) > 1:
        about = "The same beyond the steps of the training, on a few test images; `encode.steps` encodes with more."
        curve = psnr_by_step({names["test"]: list(more.values())})
        drawings.append(Drawing("psnr_by_more_steps", "PSNR by more inner steps", curve, about))
    return drawings


def psnr_histogram(psnr: npt.ArrayLike, baselines: Mapping[str, float]) -> bytes | None:
    """Draw how test images' PSNR, [m] in dB, is spread; the mean and the linear baselines are marked lines."""
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


def psnr_by_step(curves: Mapping[str, Sequence[float]]) -> bytes:
    """Draw PSNR in dB after 0, 1, ... inner steps, a line for each split; the first one's values are written out."""
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = new_figure(1)
        lines = zip(curves.items(), ((BLUE, "-", "o"), (VERMILION, "--", "s")), strict=False)
        for index, ((name, values), (colour, style, marker)) in enumerate(lines):
            axis.plot(range(len(values)), values, style, color=colour, marker=marker, linewidth=2, label=name)
            for step, value in enumerate(values if index == 0 and len(values) <= 8 else ()):
                axis.annotate(f"{value:.1f}", (step, value), (0, -14), textcoords="offset points", ha="center")
        axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axis.set(xlabel="inner steps", ylabel="PSNR, dB")
        axis.margins(x=0.1, y=0.25)
        if len(curves) > 1:
            axis.legend(loc="lower right")
        return to_svg(figure)
