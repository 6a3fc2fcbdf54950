"""How test images' PSNR is spread, the worst and the best of them, and what inner steps and bits make of it."""

from typing import Any

import numpy as np

from tasks.report import charts, charts_compression, pixels
from tasks.report.blocks import Block, Drawing, Pictures, Section, Sheet
from tasks.report.data import ReportData
from tasks.report.describe import number


def section(data: ReportData) -> Section | None:
    """Histogram beside the linear baselines, PSNR by inner step and by bits (Fig. 11), worst and best images."""
    histogram = None if data.psnr_per_image is None else charts.psnr_histogram(data.psnr_per_image, baselines(data))
    by_bits = data.metrics.get("psnr_by_bits")
    bits = charts.psnr_by_bits(by_bits) if isinstance(by_bits, dict) else None
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
    return [Drawing("psnr_by_step", "PSNR by inner step", charts_compression.psnr_by_step(curves), note)]


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
