"""Compression: rate and distortion of stored latents beside JPEG and WebP of the same images."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from functa.tasks.report.blocks import Drawing, ReportData, Section, Table
from functa.tasks.report.chart_style import BLUE, GREEN, INK, PURPLE, STYLE, VERMILION, is_number, new_figure, to_svg

ABOUT = (
    "How many bits a pixel the stored latents take, and the quality that comes back, beside JPEG and WebP: higher and "
    "further left is better. Each point is a mean over the same test images, with all bytes counted as they are "
    "written. A JPEG file of a small image is mostly headers; the line without headers counts its coded pixels alone, "
    "as if a set shared the rest."
)


Curve = Sequence[tuple[float, float]]  # (bits per pixel, PSNR in dB), rates ascending


def section(data: ReportData) -> Section | None:
    """Draw rate and distortion, and PSNR by bits (Fig. 11); below, folded, every rate and what JPEG and WebP reach."""
    drawings = [drawing for drawing in (_rate_distortion(data.metrics), _by_bits(data.metrics)) if drawing is not None]
    ours, jpeg, webp = (data.metrics.get(key) for key in ("compression", "compression_jpeg", "compression_webp"))
    tables: list[Table] = []
    if isinstance(ours, dict) and ours and isinstance(jpeg, dict) and isinstance(webp, dict):
        tables = [_rates(ours, jpeg, webp), _files(jpeg, webp)]
    return Section("compression", "Compression", ABOUT, (*drawings, *tables)) if drawings else None


def _rate_distortion(metrics: dict[str, Any]) -> Drawing | None:
    ours, jpeg, webp = (metrics.get(key) for key in ("compression", "compression_jpeg", "compression_webp"))
    if not isinstance(ours, dict) or not ours or not isinstance(jpeg, dict) or not isinstance(webp, dict):
        return None
    curves = {
        "latents, entropy coded": curve(ours, "bpp"),
        "latents, b bits each": curve(ours, "bpp_fixed"),
        "with the field's share": curve(ours, "bpp_with_field"),
        "JPEG": curve(jpeg, "bpp"),
        "WebP": curve(webp, "bpp"),
        "JPEG without headers": curve(jpeg, "bpp_scan"),
    }
    known = {name: points for name, points in curves.items() if points}
    return Drawing("rate_distortion", "Rate and distortion", rate_distortion(known), _counts(metrics))


def _by_bits(metrics: dict[str, Any]) -> Drawing | None:
    by_bits = metrics.get("psnr_by_bits")
    svg = psnr_by_bits(by_bits) if isinstance(by_bits, dict) else None
    note = (
        "Test images, when each latent number is stored in so many bits. As for every PSNR on this page, decoded "
        "values outside the pixels' range count as they are."
    )
    return None if svg is None else Drawing("psnr_by_bits", "PSNR by bits", svg, note)


def curve(points: dict[str, dict[str, float]], rate: str) -> Curve:
    """Return (bits per pixel, PSNR) in the order of rates; empty where that rate was not measured."""
    return sorted((point[rate], point["psnr"]) for point in points.values() if rate in point)


def psnr_at(points: Curve, rate: float) -> float | None:
    """Interpolate a measured curve's PSNR in dB at a rate, linear in its logarithm; None outside of the curve."""
    rates, values = (np.asarray(column) for column in zip(*points, strict=True))
    if not rates[0] <= rate <= rates[-1]:
        return None
    return float(np.interp(np.log(rate), np.log(rates), values))


def _rates(ours: dict[str, Any], jpeg: dict[str, Any], webp: dict[str, Any]) -> Table:
    peers = (curve(jpeg, "bpp"), curve(webp, "bpp"), curve(jpeg, "bpp_scan"))
    rows = []
    for bits, point in ours.items():
        beside = [psnr_at(peer, point["bpp"]) if peer else None for peer in peers]
        others = (round(point[kind], 3) for kind in ("bpp_fixed", "bpp_with_field", "bpp_unamortised"))
        rows.append((bits, round(point["bpp"], 3), *map(_decibels, (point["psnr"], *beside)), *others))
    columns = (
        "bits", "bits/pixel", "PSNR, dB", "JPEG, dB", "WebP, dB", "JPEG without headers, dB",
        "bits/pixel, uncoded", "with the field's share", "with all of the field",
    )  # fmt: skip
    note = (
        "By bits a latent number. JPEG's and WebP's PSNR is interpolated between measured qualities at the rate of the "
        "second column; a dash: no quality gives it."
    )
    return Table(
        "compression",
        "The rates of the plot, and what JPEG and WebP reach at them",
        columns,
        tuple(rows),
        note,
        folded=True,
    )


def _files(jpeg: dict[str, Any], webp: dict[str, Any]) -> Table:
    rows = [
        (name, int(quality), round(point["bpp"], 3), _decibels(point["psnr"]))
        for name, peer in (("JPEG", jpeg), ("WebP", webp))
        for quality, point in peer.items()
    ]
    columns = ("codec", "quality", "bits/pixel", "PSNR, dB")
    return Table("compression_files", "Measured JPEG and WebP files", columns, tuple(rows), folded=True)


def _decibels(value: float | None) -> float | str:
    return "\u2013" if value is None else round(value, 2)


def _counts(metrics: dict[str, Any]) -> str:
    known = metrics.get("compression_of")
    if not isinstance(known, dict):
        return ""
    return (
        f"{known['images']:,} test images. The field, {known['field_bytes']:,} bytes, is shared by "
        f"{known['field_shared_by']:,} images."
    )


_LINES = (
    (BLUE, "-", "o"), (BLUE, "--", "s"), (PURPLE, "-.", "D"),
    (VERMILION, ":", "^"), (GREEN, "--", "v"), (INK, ":", "x"),
)  # fmt: skip


def rate_distortion(curves: Mapping[str, Curve]) -> bytes:
    """Draw PSNR over bits per pixel (log scale), a line for each way of storing; they differ by marker and dash."""
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = new_figure(1, height=3.9)
        for (name, points), (colour, style, marker) in zip(curves.items(), _LINES, strict=False):
            rates, values = zip(*points, strict=True)
            axis.plot(rates, values, style, color=colour, marker=marker, markersize=5, linewidth=1.8, label=name)
        axis.set(xlabel="bits per pixel (log scale)", ylabel="PSNR, dB")
        _log_rates(axis)
        figure.legend(loc="outside upper left", ncols=2, columnspacing=1.2, handlelength=2.8)
        return to_svg(figure)


def _log_rates(axis: Axes) -> None:
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 200 else (1, 3)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
    axis.xaxis.set_minor_locator(NullLocator())


def psnr_by_bits(by_bits: Mapping[str, Any]) -> bytes | None:
    """Draw test PSNR after storing each latent number in so many bits (Fig. 11); None with fewer than two."""
    known = {int(bits): float(value) for bits, value in by_bits.items() if str(bits).isdigit() and is_number(value)}
    if len(known) < 2:
        return None
    bits = sorted(known)
    positions, values = np.arange(len(bits)), [known[b] for b in bits]
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = new_figure(1, height=3.4)
        axis.plot(positions, values, color=BLUE, marker="o", linewidth=2)
        for x, value in zip(positions, values, strict=True):
            axis.annotate(f"{value:.1f}", (x, value), (-3, 6), textcoords="offset points", ha="right", fontsize=9)
        axis.set_xticks(positions, ["float32" if b == 32 else str(b) for b in bits])
        axis.set(xlabel="bits per latent number", ylabel="test PSNR, dB")
        axis.grid(axis="x", visible=False)
        axis.margins(x=0.12, y=0.2)
        return to_svg(figure)
