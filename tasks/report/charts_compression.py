"""Charts of reconstruction and compression: PSNR by inner step, rate and distortion."""

from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from tasks.report.charts import BLUE, GREEN, INK, PURPLE, STYLE, VERMILION, new_figure, to_svg

Curve = Sequence[tuple[float, float]]  # (bits per pixel, PSNR in dB), rates ascending
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
