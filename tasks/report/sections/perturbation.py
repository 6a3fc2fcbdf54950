"""Latents: how their channels are spread (Fig. 8), and what single numbers change: Figs. 12, 13; of vectors Fig. 4."""

from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.ticker import MaxNLocator

from functa.tasks.report import pixels
from functa.tasks.report.blocks import Block, Drawing, Pictures, Pixels, ReportData, Section, Sheet, Table
from functa.tasks.report.chart_style import BLUE, INK, PAPER, STYLE, VERMILION, Numbers, new_figure, to_svg
from functa.tasks.report.words import number

ABOUT = "What the numbers of a latent do: some are changed, then the image is decoded again. "

ZOOMED = 4  # patches per side of the enlarged part


def section(data: ReportData) -> Section | None:
    """Show what was measured of spatial latents or of vectors."""
    arrays, spread = data.arrays.get("perturbation", {}), _spread(data)
    if "channel" in arrays:
        return _of_grids(data, arrays, spread)
    return _of_vectors(data, arrays, spread) if "largest" in arrays else None


def _spread(data: ReportData) -> tuple[Block, ...]:
    arrays = data.arrays.get("latents", {})
    if not {"mean", "sd"} <= arrays.keys():
        return ()
    note = "Over latent positions and training images."
    svg = channel_spread(arrays["mean"], arrays["sd"])
    return (Drawing("latent_channels", "Channels of the latents", svg, note),)


def _of_grids(data: ReportData, arrays: dict[str, Any], spread: tuple[Block, ...]) -> Section:
    strength, shown = float(arrays["strengths"].max()), int(arrays["shown"])
    chart = effect_by_strength(arrays["strengths"], arrays["rmse"], arrays["slope"])
    effect = (
        "Root of the mean squared change of a patch, averaged over patches and images (Fig. 13). "
        "The fitted line is that of the median channel."
    )
    factor = min(_factor(arrays, name) for name in ("channel", "position"))
    everywhere, spatial = _rows(arrays, "channel", factor), int(arrays["spatial"])
    if spatial > ZOOMED:
        everywhere += (Pictures("enlarged: the middle", _middle(everywhere[-1].images, spatial)),)
    title = f"Channel {shown} moved everywhere by {strength:g}"
    asked = bool(arrays.get("asked", False))  # reports of older runs have no such choice
    note = f"{'As asked for' if asked else 'The channel of median effect'} (Fig. 12). Grey is no change."
    channel = Sheet("perturbation_channel", title, everywhere, note)
    title, note = "One position moved by a standard deviation", "All channels of a position in the middle."
    position = Sheet("perturbation_position", title, _rows(arrays, "position", factor), note)
    drawing = Drawing("perturbation_rmse", "Effect by strength", chart, effect)
    blocks: tuple[Block, ...] = (_figures(data), *spread, drawing, channel, position)
    about = ABOUT + "Locality is the share of the squared change inside its own patch when one position is perturbed."
    return Section("perturbation", "Latents", about, blocks)


def _of_vectors(data: ReportData, arrays: dict[str, Any], spread: tuple[Block, ...]) -> Section:
    grid = int(arrays["grid"])
    rows = [Pictures("unperturbed", arrays["unperturbed"])]
    rows += [Pictures(f"{name}: entry {int(arrays[f'{name}_entry'])}", arrays[name])
             for name in ("largest", "median", "lowest")]  # fmt: skip
    title = "The entries of largest, median and lowest effect"
    note = f"Each raised by its own standard deviation (Fig. 4); of {len(arrays['entries'])} entries tried."
    even = float(arrays.get("even", 1 / grid**2))
    about = ABOUT + (
        f"A vector has no patches of its own. Locality is the largest share of the squared change in any of {grid}x"
        f"{grid} patches when one entry is perturbed; an even change gives {even:.3g}."
        if grid > 1
        else "A vector has no patches of its own, and this image is too small for several: locality is left out."
    )
    chart = effect_by_entry(arrays["mae"])
    drawing = Drawing("perturbation_entries", "Effect by entry", chart, "Averaged over images.")
    blocks: tuple[Block, ...] = (
        _figures(data), *spread, drawing, Sheet("perturbation_entries_shown", title, tuple(rows), note)
    )  # fmt: skip
    return Section("perturbation", "Latents", about, blocks)


def _figures(data: ReportData) -> Table:
    """List the figures by name; those that were not measured are left out."""
    named = (
        ("locality", "locality", None),
        ("R\u00b2 of a line, median channel", "perturbation", "linear_r2"),
        ("mean cosine of the pattern between patches", "perturbation", "stability_patches"),
        ("mean cosine of the pattern between images", "perturbation", "stability_images"),
        ("strongest entry, grey levels", "perturbation", "mae_largest"),
        ("median entry, grey levels", "perturbation", "mae_median"),
        ("weakest entry, grey levels", "perturbation", "mae_lowest"),
        ("sd of a training latent's numbers", "latent_sd", None),
    )
    found = [(name, number(data.metrics, key, inner)) for name, key, inner in named]
    rows = tuple((name, float(f"{value:.4g}")) for name, value in found if value is not None)
    return Table("perturbation", "Figures of this section", ("figure", "value"), rows, folded=True)


def _change(arrays: dict[str, Any], name: str) -> npt.NDArray[np.int64]:
    return np.asarray(arrays[name].astype(np.int64) - arrays["unperturbed"].astype(np.int64))


def _factor(arrays: dict[str, Any], name: str) -> int:
    """Return the factor by which 99 % of a change can be enlarged around grey without clipping."""
    high = float(np.percentile(np.abs(_change(arrays, name)), 99))
    return next((factor for factor in pixels.AMPLIFICATIONS if high * factor <= 127), 1)


def _rows(arrays: dict[str, Any], name: str, factor: int) -> tuple[Pictures, ...]:
    """Show before, after, and the signed change around grey, enlarged by the factor."""
    shown = np.clip(128 + factor * _change(arrays, name), 0, 255).astype(np.uint8)
    return (
        Pictures("unperturbed", arrays["unperturbed"]),
        Pictures("perturbed", arrays[name]),
        Pictures(f"change \u00d7 {factor}", shown),
    )


def _middle(images: Pixels, spatial: int) -> Pixels:
    """Cut out the middle patches of [n, H, W, C], pixels repeated."""
    side = images.shape[1] // spatial
    start = (spatial - ZOOMED) // 2 * side
    part = slice(start, start + ZOOMED * side)
    cut, factor = images[:, part, part], spatial // ZOOMED
    return cut.repeat(factor, axis=1).repeat(factor, axis=2)


def effect_by_strength(strengths: Numbers, rmse: Numbers, slope: Numbers) -> bytes:
    """Draw the RMSE [c, m] of each channel moved everywhere by strengths [m], and the median's line (Fig. 13)."""
    order = np.argsort(strengths)
    x = strengths[order]
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = new_figure(1, height=3.0)
        for index, curve in enumerate(rmse[:, order]):
            axis.plot(*_through_origin(x, curve), color=BLUE, linewidth=0.8, alpha=0.45,
                      label=f"each of {len(rmse)} channels" if index == 0 else None)  # fmt: skip
        middle = int(np.argsort(slope)[(len(slope) - 1) // 2])
        axis.plot(*_through_origin(x, rmse[middle, order]), color=INK, linewidth=2, marker="o", markersize=4,
                  label="median channel")  # fmt: skip
        ends = np.array([x.min(), 0, x.max()])
        axis.plot(ends, slope[middle] * np.abs(ends), "--", color=VERMILION, linewidth=2,
                  label="fitted line")  # fmt: skip
        axis.set(xlabel="added to the channel everywhere", ylabel="RMSE of a patch")
        axis.set_ylim(bottom=0)
        figure.legend(loc="outside upper left", ncols=2, columnspacing=1.2, handlelength=2.2)
        return to_svg(figure)


def _through_origin(x: Numbers, y: Numbers) -> tuple[Numbers, Numbers]:
    """Return points in the order of x, with (0, 0) among them."""
    index = int(np.searchsorted(x, 0))
    return np.insert(x, index, 0.0), np.insert(y, index, 0.0)


def effect_by_entry(mae: Numbers) -> bytes:
    """Draw the mean absolute error of entries perturbed one by one, [e] in grey levels, largest first."""
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = new_figure(1)
        axis.plot(np.arange(1, len(mae) + 1), np.sort(mae)[::-1], color=BLUE, linewidth=2, marker="o", markersize=3)
        axis.set(xlabel="entries, strongest first", ylabel="mean absolute error,\ngrey levels")
        axis.set_ylim(bottom=0)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        return to_svg(figure)


MARKED_UP_TO = 64  # channels; more are a line without marks


def channel_spread(mean: Numbers, sd: Numbers) -> bytes:
    """Draw the mean and standard deviation of every channel, [c] each (Fig. 8)."""
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
