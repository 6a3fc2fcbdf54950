"""Generation: how far samples are from real images, space by space, beside floor and ceiling."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.ticker import FuncFormatter

from functa.tasks.evaluation.catalogue import SPACES
from functa.tasks.report.blocks import Drawing, ReportData, Section, Table
from functa.tasks.report.chart_style import BLUE, FAINT, GREEN, PURPLE, STYLE, VERMILION, new_figure, to_svg
from functa.tasks.report.words import number, short, show

MEASURES = (
    "Fr\u00e9chet distance", "\u2026 of reconstructions (floor)", "\u2026 of test images (floor of unseen images)",
    "\u2026 of noise latents (ceiling)", "Kernel distance", "Precision", "Recall", "Label agreement",
    "\u2026 of test images (most it can be)", "Dimensions", "Compared one by one",
)  # fmt: skip

FID = "Inception features: FID"


def section(data: ReportData) -> Section | None:
    """Show a table of the feature spaces, and what a reader of it must know."""
    reference = data.metrics.get("fd_reference")
    if not isinstance(reference, dict):
        return None
    dimensions = reference.get("dimensions")
    spaces = list(dimensions) if isinstance(dimensions, dict) else []
    if not spaces:
        return None
    columns = [_column(data.metrics, str(space)) for space in spaces]
    rows = tuple(zip(("Features", *MEASURES), *columns, strict=True))  # measures below each other fit a phone
    rows = tuple(row for row in rows if any(row[1:]))  # no space has a label agreement where samples have no labels
    notes = [*_warnings(data.metrics, spaces), *_protocol(data.metrics)]
    table = Table("generation", "Samples against training images", rows[0], rows[1:], " ".join(notes))
    chart = _scale(data.metrics, spaces)
    return Section("generation", "Generation", _about(data.metrics), (*([] if chart is None else [chart]), table))


def _scale(metrics: dict[str, Any], spaces: list[str]) -> Drawing | None:
    """Draw each space's distance between its floor and its ceiling."""
    keys = ("fd_reconstruction", "fd", "fd_noise", "fd_test")
    values = {SPACES.get(space, space): [number(metrics, key, space) for key in keys] for space in spaces}
    positive = {name: [value if value and value > 0 else None for value in found] for name, found in values.items()}
    known = {name: found for name, found in positive.items() if None not in found[:3]}
    if not known:
        return None
    note = "Further left is better. Log scale; distances of different features cannot be compared with each other."
    return Drawing("frechet_distances", "Fr\u00e9chet distances between floor and ceiling", frechet_scale(known), note)


def frechet_scale(values: Mapping[str, Sequence[float | None]]) -> bytes:
    """Draw (floor, samples, ceiling, test images or None) of each feature space on a log axis, a panel for each."""
    marks = (
        (GREEN, "|", "reconstructions (floor)"), (BLUE, "o", "samples"), (VERMILION, "X", "noise (ceiling)"),
        (PURPLE, "d", "test images"),
    )  # fmt: skip
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(len(values), height=1.4)
        for axis, (name, found) in zip(axes, values.items(), strict=True):
            places = [math.nan if value is None else value for value in found]
            axis.plot([places[0], places[2]], [0, 0], color=FAINT, linewidth=4, zorder=1)
            for place, (colour, marker, label) in zip(places, marks, strict=True):
                axis.plot([place], [0], marker, color=colour, markersize=12, markeredgewidth=2.5, label=label)
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_title(short(name, 40))
            axis.set_yticks([])
            axis.spines["left"].set_visible(False)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=2, handlelength=1.4)
        return to_svg(figure)


def _about(metrics: dict[str, Any]) -> str:
    samples, count = number(metrics, "fd_reference", "samples"), number(metrics, "fd_reference", "count")
    if samples is None or count is None:
        return ""
    about = (
        f"{samples:,.0f} samples and {count:,.0f} training images, compared by their features. Lower distances and "
        "higher shares are better. Reconstructions of real images are the floor, which no sample can be expected to "
        "pass; decoded noise is the ceiling, where a model has learned nothing."
    )
    tests = number(metrics, "fd_reference", "test")
    if tests:
        about += f" {tests:,.0f} test images show how far images are that no model has seen."
    duplicates = number(metrics, "duplicates")
    if duplicates:
        about += f" {duplicates:,.0f} of the samples repeat another one pixel by pixel."
    return about


def _column(metrics: dict[str, Any], space: str) -> tuple[str, ...]:
    fid = space == "inception" and number(metrics, "fid") is not None
    keys = ("fid", "fid_reconstruction") if fid else ("fd", "fd_reconstruction")
    inner = None if fid else space
    values = [number(metrics, key, inner) for key in keys]
    values += [number(metrics, key, space) for key in ("fd_test", "fd_noise", "kd")]
    shares = [number(metrics, key, space) for key in ("precision", "recall", "label_agreement", "probe_top1")]
    counts = [metrics["fd_reference"].get(key) for key in ("dimensions", "subset")]
    shown = [number(inner, space) if isinstance(inner, dict) else None for inner in counts]
    return (
        FID if fid else SPACES.get(space, space),
        *("" if value is None else show(value) for value in values),
        *("" if share is None else show(share, "share") for share in shares),
        *("" if count is None else show(count, "count") for count in shown),
    )


def _warnings(metrics: dict[str, Any], spaces: list[str]) -> list[str]:
    """Name distances that were not measured, and those whose covariance lacks full rank."""
    notes, samples = [], number(metrics, "fd_reference", "samples") or 0
    for space in spaces:
        wide = number(metrics["fd_reference"]["dimensions"], space) or 0
        taken = number(metrics, "fd", space) is not None or (space == "inception" and "fid" in metrics)
        name, counts = SPACES.get(space, space), f"{samples:,.0f} samples, {wide:,.0f} dimensions"
        if not taken:
            why = "too few for a covariance" if samples <= wide else "too many for a covariance"
            notes.append(f"No Fr\u00e9chet distance of {name}: {counts} are {why}.")
        elif samples <= wide:
            notes.append(f"The distance of {name} is of covariances without full rank: {counts}.")
    if any(number(metrics, "label_agreement", space) is not None for space in spaces):
        notes.append(
            "Label agreement: the share of samples that a linear probe of the training images' features takes for "
            "their label."
        )
    if any(number(metrics, "kd", space) is not None for space in spaces):
        notes.append(
            "Kernel distance (unbiased, so it may be negative), precision and recall (three nearest neighbours) "
            "compare single rows: the last line has how many of each set."
        )
    return notes


def _protocol(metrics: dict[str, Any]) -> list[str]:
    return [*_protocols_of_spaces(metrics), *_protocol_of_inception(metrics)]


def _protocols_of_spaces(metrics: dict[str, Any]) -> list[str]:
    found, notes = metrics.get("fd_protocol"), []
    for space, protocol in (found if isinstance(found, dict) else {}).items():
        if not isinstance(protocol, dict):
            continue
        if space == "wavelet":
            level = number(protocol, "level") or 0
            notes.append(
                f"The wavelet distance is the mean over {4**level:,.0f} packets of {protocol.get('wavelet', '')} "
                f"wavelets, level {level:.0f} (Fr\u00e9chet Wavelet Distance)."
            )
        else:
            weights, form = str(protocol.get("weights", ""))[:16], protocol.get("input", "")
            notes.append(f"{SPACES.get(space, space)}: weights sha256 {weights}\u2026, {form}; never FID.")
    return notes


def _protocol_of_inception(metrics: dict[str, Any]) -> list[str]:
    for key, name in (("fid_protocol", "FID"), ("inception_protocol", "Inception features, not FID")):
        protocol = metrics.get(key)
        if isinstance(protocol, dict):
            weights, resize = str(protocol.get("weights", ""))[:16], protocol.get("resize", "")
            return [f"{name}: weights sha256 {weights}\u2026, {resize}, {protocol.get('batch', '')} images at a time."]
    return []
