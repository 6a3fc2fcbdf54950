"""Rate and distortion of the whole path: stored latents beside JPEG and WebP of the same images."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from functa.tasks.report.blocks import Drawing, ReportData, Section, Table
from functa.tasks.report.charts import BLUE, GREEN, INK, PURPLE, STYLE, VERMILION, new_figure, to_svg

ABOUT = (
    "Each point is the mean over the same test images: bits per pixel as really written, and the PSNR of the 8-bit "
    "images that come back. JPEG with fitted Huffman tables and WebP as Pillow writes them, headers included; of small "
    "images a JPEG file is mostly headers, so that its coded pixels alone, by the standard tables, stand beside it, as "
    "if a set shared the rest."
)


Curve = Sequence[tuple[float, float]]  # (bits per pixel, PSNR in dB), rates ascending


def section(data: ReportData) -> Section | None:
    """One plot, and a table of every rate with what JPEG and WebP reach at it."""
    ours, jpeg, webp = (data.metrics.get(key) for key in ("compression", "compression_jpeg", "compression_webp"))
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
    told = {name: points for name, points in curves.items() if points}
    drawing = Drawing("rate_distortion", "Rate and distortion", rate_distortion(told), _counts(data.metrics))
    return Section("compression", "Compression", ABOUT, (drawing, _rates(ours, jpeg, webp), _files(jpeg, webp)))


def curve(points: dict[str, dict[str, float]], rate: str) -> Curve:
    """(bits per pixel, PSNR) in the order of rates; empty where that rate was not measured."""
    return sorted((point[rate], point["psnr"]) for point in points.values() if rate in point)


def psnr_at(points: Curve, rate: float) -> float | None:
    """PSNR in dB of a measured curve at a rate, linear in its logarithm; None outside of what was measured."""
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
    return Table("compression", "Our rates, and what JPEG and WebP make of them", columns, tuple(rows), note)


def _files(jpeg: dict[str, Any], webp: dict[str, Any]) -> Table:
    rows = [
        (name, int(quality), round(point["bpp"], 3), _decibels(point["psnr"]))
        for name, peer in (("JPEG", jpeg), ("WebP", webp))
        for quality, point in peer.items()
    ]
    return Table("compression_files", "Measured files", ("codec", "quality", "bits/pixel", "PSNR, dB"), tuple(rows))


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


def psnr_by_step(curves: Mapping[str, Sequence[float]]) -> bytes:
    """PSNR in dB after 0, 1, ... inner steps, a line for each split; the first one's values are written out."""
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = new_figure(1)
        lines = zip(curves.items(), ((BLUE, "-", "o"), (VERMILION, "--", "s")), strict=False)
        for place, ((name, values), (colour, style, marker)) in enumerate(lines):
            axis.plot(range(len(values)), values, style, color=colour, marker=marker, linewidth=2, label=name)
            for step, value in enumerate(values if place == 0 and len(values) <= 8 else ()):
                axis.annotate(f"{value:.1f}", (step, value), (0, -14), textcoords="offset points", ha="center")
        axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axis.set(xlabel="inner steps", ylabel="PSNR, dB")
        axis.margins(x=0.1, y=0.25)
        if len(curves) > 1:
            axis.legend(loc="lower right")
        return to_svg(figure)


def rate_distortion(curves: Mapping[str, Curve]) -> bytes:
    """PSNR over bits per pixel (log scale), a line for each way of storing, told apart by marker and dash."""
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
