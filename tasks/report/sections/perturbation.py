"""What single latent numbers do to the image: Figs. 12 and 13 of spatial latents, Fig. 4 of vectors."""

from typing import Any

import matplotlib
import numpy as np
from matplotlib.ticker import MaxNLocator

from functa.tasks.report import pixels
from functa.tasks.report.blocks import Block, Drawing, Pictures, Pixels, ReportData, Section, Sheet, Table
from functa.tasks.report.charts import BLUE, INK, STYLE, VERMILION, new_figure, to_svg
from functa.tasks.report.sections.latents import Numbers
from functa.tasks.report.words import number

ABOUT = (
    "Latents of test images with some numbers changed, decoded. Figures are of pixels that are not clamped; pictures "
    "are. "
)

ZOOMED = 4  # patches per side of the enlarged part


def section(data: ReportData) -> Section | None:
    """Of spatial latents or of vectors, whichever was measured."""
    arrays = data.arrays.get("perturbation", {})
    if "channel" in arrays:
        return _of_grids(data, arrays)
    return _of_vectors(data, arrays) if "largest" in arrays else None


def _of_grids(data: ReportData, arrays: dict[str, Any]) -> Section:
    strength, shown = float(arrays["strengths"].max()), int(arrays["shown"])
    chart = effect_by_strength(arrays["strengths"], arrays["rmse"], arrays["slope"])
    note = "The root of the mean squared change of a patch, averaged over patches and images (Fig. 13)."
    everywhere, spatial = _rows(arrays, "channel"), int(arrays["spatial"])
    if spatial > ZOOMED:
        everywhere += (Pictures("enlarged: the middle", _middle(everywhere[-1].images, spatial)),)
    title = f"Channel {shown} moved everywhere by {strength:g}"
    told = "The channel of median effect (Fig. 12). Grey is no change."
    channel = Sheet("perturbation_channel", title, everywhere, told)
    title, told = "One position moved by a standard deviation", "All channels of a position in the middle."
    position = Sheet("perturbation_position", title, _rows(arrays, "position"), told)
    drawing = Drawing("perturbation_rmse", "Effect by strength", chart, note)
    blocks: tuple[Block, ...] = (_figures(data), drawing, channel, position)
    about = ABOUT + "Locality is the share of the squared change inside its own patch when one position is perturbed."
    return Section("perturbation", "Perturbation", about, blocks)


def _of_vectors(data: ReportData, arrays: dict[str, Any]) -> Section:
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
        else "A vector has no patches of its own, and this image has no room for several: locality is left out."
    )
    chart = effect_by_entry(arrays["mae"])
    drawing = Drawing("perturbation_entries", "Effect by entry", chart, "Averaged over images.")
    blocks: tuple[Block, ...] = (
        _figures(data), drawing, Sheet("perturbation_entries_shown", title, tuple(rows), note)
    )  # fmt: skip
    return Section("perturbation", "Perturbation", about, blocks)


def _figures(data: ReportData) -> Table:
    """The figures by name; those that were not measured are left out."""
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
    return Table("perturbation", "Figures", ("figure", "value"), rows)


def _rows(arrays: dict[str, Any], name: str) -> tuple[Pictures, ...]:
    """Before, after, and the signed change around grey, as much enlarged as 99 % of it can stand."""
    before, after = arrays["unperturbed"], arrays[name]
    change = after.astype(np.int64) - before.astype(np.int64)
    high = float(np.percentile(np.abs(change), 99))
    factor = next((factor for factor in pixels.AMPLIFICATIONS if high * factor <= 127), 1)
    shown = np.clip(128 + factor * change, 0, 255).astype(np.uint8)
    return Pictures("unperturbed", before), Pictures("perturbed", after), Pictures(f"change \u00d7{factor}", shown)


def _middle(images: Pixels, spatial: int) -> Pixels:
    """The middle patches of [n, H, W, C], pixels repeated."""
    side = images.shape[1] // spatial
    start = (spatial - ZOOMED) // 2 * side
    part = slice(start, start + ZOOMED * side)
    cut, factor = images[:, part, part], spatial // ZOOMED
    return cut.repeat(factor, axis=1).repeat(factor, axis=2)


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
