"""How test images' PSNR is spread, and what fewer bits cost (Fig. 11)."""

from tasks.report import charts
from tasks.report.blocks import Drawing, Section
from tasks.report.data import ReportData
from tasks.report.describe import number


def section(data: ReportData) -> Section | None:
    """Histogram beside the linear baselines, and PSNR by bits."""
    histogram = None if data.psnr_per_image is None else charts.psnr_histogram(data.psnr_per_image, baselines(data))
    by_bits = data.metrics.get("psnr_by_bits")
    bits = charts.psnr_by_bits(by_bits) if isinstance(by_bits, dict) else None
    blocks = []
    if histogram is not None:
        note = "Dashed and dotted: what a linear model reaches with as many numbers."
        blocks.append(Drawing("psnr_histogram", "Test images by PSNR", histogram, note))
    if bits is not None:
        blocks.append(Drawing("psnr_by_bits", "PSNR by bits", bits, "Each latent number stored in so many bits."))
    return Section("psnr", "PSNR", "", tuple(blocks)) if blocks else None


def baselines(data: ReportData) -> dict[str, float]:
    """The linear baselines that were measured, by name, in dB."""
    named = {"patch PCA": "psnr_pca_patch", "whole-image PCA": "psnr_pca_image"}
    values = {name: number(data.metrics, key) for name, key in named.items()}
    return {name: value for name, value in values.items() if value is not None}
