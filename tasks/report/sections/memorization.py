"""Memorisation: nearest neighbours of samples (Fig. 5), distinct counts (Table 7), the verdict."""

from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from functa.tasks.report.blocks import Block, Drawing, Pictures, ReportData, Section, Sheet, Table
from functa.tasks.report.chart_style import BLUE, INK, STYLE, VERMILION, Numbers, new_figure, to_svg
from functa.tasks.report.words import number, show

ORDER = ("nearest", "second", "third")


def section(data: ReportData) -> Section | None:
    """Give the verdict in words, then the evidence for it."""
    arrays = data.arrays.get("memorization", {})
    if "samples" not in arrays:
        return None
    blocks: list[Block] = [_sheet(data, arrays)]
    unseen, samples = arrays["isolation_unseen"], arrays["isolation"]
    chart = isolation(samples, unseen, float(np.quantile(unseen, 0.05)))
    note = (
        "Distance to the nearest training image over distance to the third nearest, of their reconstructions. A copy "
        "is near one of them alone, at the left. No model has seen the test images."
    )
    blocks += [Drawing("memorization_isolation", "How isolated the samples are", chart, note), _table(data, arrays)]
    return Section("memorization", "Memorisation", _verdict(data, arrays), tuple(blocks))


def _verdict(data: ReportData, arrays: dict[str, Any]) -> str:
    share, flagged = number(data.metrics, "memorized_share"), data.metrics.get("memorized")
    if share is None:
        same = show(float(arrays["same"].mean()), "share")
        return (
            f"No verdict on whether the model repeats its training images is possible: {same} of the test images "
            "repeat training images themselves, and test images set the bounds below which a sample counts."
        )
    verdict = (
        "The model repeats its training images" if flagged else "No sign that the model repeats its training images"
    )
    return (
        f"{verdict}: {show(share, 'share')} of the samples are nearer to one training image's reconstruction, and more "
        "isolated, than 95 % of test images are; chance gives at most 5 %, and 15 % is called memorised."
    )


def _sheet(data: ReportData, arrays: dict[str, Any]) -> Sheet:
    # A sample of an unconditional model has no class; its label is that of the nearest training image.
    names = [_name(data, int(label)) if _conditional(data) else "" for label in arrays["labels"]]
    repeats = ("repeats" if mark else "" for mark in arrays["repeating"])
    marks = [", ".join(filter(None, pair)) for pair in zip(names, repeats, strict=True)]
    rows = [Pictures("sample", arrays["samples"], tuple(marks))]
    for rank, images in enumerate(arrays["nearest"]):
        captions = tuple(f"{distance:.2f}" for distance in arrays["distances"][rank])
        rows.append(Pictures(f"{ORDER[rank]} training image", images, captions))
    note = (
        "Samples evenly spaced in the order drawn, not chosen. Below each: its three nearest training images in pixel "
        "space, with their Euclidean distances (pixels from 0 to 1; Fig. 5)."
    )
    return Sheet("nearest_neighbours", "Nearest training images", tuple(rows), note)


def _table(data: ReportData, arrays: dict[str, Any]) -> Table:
    columns = ("label", "images", "draws", "distinct", "expected", "sd")
    rows = []
    for label, images, draws, distinct, expected, sd in zip(*(arrays[f"table_{name}"] for name in columns)):
        z = round((distinct - expected) / sd, 1) if sd > 1e-9 else ""
        name = "all" if label < 0 else _name(data, int(label))
        rows.append((name, int(images), int(draws), int(distinct), round(expected, 1), round(sd, 2), z))
    conditional = _conditional(data)
    which = "the samples of a class" if conditional else "samples, by the class of that image"
    note = (
        f"How many different training images are nearest to {which}, beside what even draws of the class's "
        "training images give (Table 7), and how many standard deviations lie between. For a model that memorises it "
        "shows how many images it leaves out; for another it only shows that some images are near to many."
    )
    head = ("class" if conditional else "class of the nearest", "images", "draws", "distinct", "expected", "sd", "z")
    return Table("distinct", "Distinct nearest images", head, tuple(rows), note, folded=True)


def _conditional(data: ReportData) -> bool:
    """Return whether samples were drawn for a class; true of a config without that setting."""
    process = (data.config.get("diffusion") or {}).get("process") or {}
    return bool(process.get("conditional", True))


def _name(data: ReportData, label: int) -> str:
    return data.classes[label] if 0 <= label < len(data.classes) else str(label)


def isolation(samples: Numbers, unseen: Numbers, bound: float) -> bytes:
    """Draw nearest over third nearest distance of samples [n] and test images [m]; below `bound` may be copies."""
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
    face = (*matplotlib.colors.to_rgb(colour), 0.25)
    axis.stairs(
        shares, bins, edgecolor=colour, linewidth=1.6, label=label,
        fill=hatch is not None, facecolor=face, hatch=hatch,
    )  # fmt: skip
