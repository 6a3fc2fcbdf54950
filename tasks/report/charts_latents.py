"""Charts of latents and of samples beside training images: Figs. 8, 13 and 4, and how isolated samples are."""

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from tasks.report.charts import BLUE, INK, PAPER, STYLE, VERMILION, new_figure, to_svg

Numbers = npt.NDArray[np.float64]
MARKED_UP_TO = 64  # channels; more are a line without marks


def channel_spread(mean: Numbers, sd: Numbers) -> bytes:
    """Mean and standard deviation of every channel, [c] each (Fig. 8)."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(2, height=1.9)
        panels = zip(axes, ("mean", "standard deviation"), (mean, sd), (BLUE, VERMILION), strict=True)
        for axis, title, values, colour in panels:
            if len(values) <= MARKED_UP_TO:
                axis.bar(np.arange(len(values)), values, color=colour, edgecolor=PAPER, linewidth=0.4)
            else:
                axis.plot(np.arange(len(values)), values, color=colour, linewidth=0.8)
            axis.axhline(0, color=INK, linewidth=0.8)
            axis.set_title(title)
            axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            axis.yaxis.set_major_locator(MaxNLocator(4))
            axis.grid(axis="x", visible=False)
        axes[-1].set_xlabel("channel")
        return to_svg(figure)


def effect_by_strength(strengths: Numbers, rmse: Numbers, slope: Numbers) -> bytes:
    """RMSE [c, m] of each channel moved everywhere by strengths [m], and the median channel's line (Fig. 13)."""
    order = np.argsort(strengths)
    x = strengths[order]
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = new_figure(1, height=3.0)
        for place, curve in enumerate(rmse[:, order]):
            axis.plot(*_through_origin(x, curve), color=BLUE, linewidth=0.8, alpha=0.45,
                      label=f"each of {len(rmse)} channels" if place == 0 else None)  # fmt: skip
        middle = int(np.argsort(slope)[(len(slope) - 1) // 2])
        axis.plot(*_through_origin(x, rmse[middle, order]), color=INK, linewidth=2, marker="o", markersize=4,
                  label="median channel")  # fmt: skip
        ends = np.array([x.min(), 0, x.max()])
        axis.plot(ends, slope[middle] * np.abs(ends), "--", color=VERMILION, linewidth=2, label="its fit")
        axis.set(xlabel="added to the channel everywhere", ylabel="RMSE of a patch")
        axis.set_ylim(bottom=0)
        figure.legend(loc="outside upper left", ncols=2, columnspacing=1.2, handlelength=2.2)
        return to_svg(figure)


def _through_origin(x: Numbers, y: Numbers) -> tuple[Numbers, Numbers]:
    """Points in the order of x, with (0, 0) among them."""
    place = int(np.searchsorted(x, 0))
    return np.insert(x, place, 0.0), np.insert(y, place, 0.0)


def effect_by_entry(mae: Numbers) -> bytes:
    """Mean absolute error of entries perturbed one by one, [e] in grey levels, largest first."""
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = new_figure(1)
        axis.plot(np.arange(1, len(mae) + 1), np.sort(mae)[::-1], color=BLUE, linewidth=2, marker="o", markersize=3)
        axis.set(xlabel="entries, strongest first", ylabel="mean absolute error,\ngrey levels")
        axis.set_ylim(bottom=0)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        return to_svg(figure)


def isolation(samples: Numbers, unseen: Numbers, bound: float) -> bytes:
    """Nearest over third nearest distance of samples [n] and test images [m]; those below `bound` may be copies."""
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = new_figure(1, height=2.9)
        bins = np.linspace(0, 1, 41)
        _shares(axis, unseen, bins, "test images", INK, None)
        _shares(axis, samples, bins, "samples", BLUE, "//")
        axis.axvline(bound, color=VERMILION, linestyle="--", linewidth=2, label="5 % of test images")
        axis.set(xlabel="nearest / third nearest distance", ylabel="share, %", xlim=(0, 1))
        axis.grid(axis="x", visible=False)
        figure.legend(loc="outside upper left", ncols=2, columnspacing=1.2, handlelength=2.2)
        return to_svg(figure)


def _shares(axis: Axes, values: Numbers, bins: Numbers, label: str, colour: str, hatch: str | None) -> None:
    shares = 100 * np.histogram(values, bins)[0] / max(1, len(values))
    filled = {"fill": hatch is not None, "facecolor": (*matplotlib.colors.to_rgb(colour), 0.25), "hatch": hatch}
    axis.stairs(shares, bins, edgecolor=colour, linewidth=1.6, label=label, **filled)
