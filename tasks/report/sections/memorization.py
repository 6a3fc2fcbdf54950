"""Whether samples repeat training images: nearest neighbours (Fig. 5), distinct counts (Table 7), the verdict."""

from typing import Any

import numpy as np

from tasks.report import charts_latents
from tasks.report.blocks import Block, Drawing, Pictures, Section, Sheet, Table
from tasks.report.data import ReportData
from tasks.report.describe import number, show

ORDER = ("nearest", "second", "third")


def section(data: ReportData) -> Section | None:
    """The verdict in words, then what it stands on."""
    arrays = data.arrays.get("memorization", {})
    if "samples" not in arrays:
        return None
    blocks: list[Block] = [_sheet(data, arrays)]
    unseen, samples = arrays["isolation_unseen"], arrays["isolation"]
    chart = charts_latents.isolation(samples, unseen, float(np.quantile(unseen, 0.05)))
    note = (
        "Distances to reconstructions of the training images. A copy is near one of them alone, at the left; the test "
        "images are what no model has seen."
    )
    blocks += [Drawing("memorization_isolation", "How isolated the samples are", chart, note), _table(data, arrays)]
    return Section("memorization", "Memorisation", _verdict(data, arrays), tuple(blocks))


def _verdict(data: ReportData, arrays: dict[str, Any]) -> str:
    if not arrays.get("told", True):
        same = show(float(arrays["same"].mean()), "share")
        return (
            f"Nothing can be told of whether the model repeats its training images: {same} of the test images repeat "
            "training images themselves, and test images set the bounds below which a sample counts."
        )
    share, flagged = number(data.metrics, "memorized_share"), data.metrics.get("memorized")
    if share is None:
        return ""
    said = "The model repeats its training images" if flagged else "No sign that the model repeats its training images"
    return (
        f"{said}: {show(share, 'share')} of the samples are nearer to one training image's reconstruction, and more "
        "isolated, than 95 % of test images are; chance gives at most 5 %, and 15 % is called memorised."
    )


def _sheet(data: ReportData, arrays: dict[str, Any]) -> Sheet:
    names = [_name(data, int(label)) for label in arrays["labels"]]
    marks = [f"{name}, repeats" if mark else name for name, mark in zip(names, arrays["repeating"], strict=True)]
    rows = [Pictures("sample", arrays["samples"], tuple(marks))]
    for place, images in enumerate(arrays["nearest"]):
        captions = tuple(f"{distance:.2f}" for distance in arrays["distances"][place])
        rows.append(Pictures(f"{ORDER[place]} training image", images, captions))
    note = (
        "Samples by even steps through all, not chosen; below each its three nearest training images in pixel space "
        "and their Euclidean distances, of pixels in [0, 1] (Fig. 5)."
    )
    return Sheet("nearest_neighbours", "Nearest training images", tuple(rows), note)


def _table(data: ReportData, arrays: dict[str, Any]) -> Table:
    columns = ("label", "images", "draws", "distinct", "expected", "sd")
    rows = []
    for label, images, draws, distinct, expected, sd in zip(*(arrays[f"table_{name}"] for name in columns)):
        z = round((distinct - expected) / sd, 1) if sd > 1e-9 else ""
        name = "all" if label < 0 else _name(data, int(label))
        rows.append((name, int(images), int(draws), int(distinct), round(expected, 1), round(sd, 2), z))
    note = (
        "How many different training images are nearest to the samples of a class, beside what even draws of its "
        "training images give (Table 7), and how many standard deviations lie between. It says how a model that "
        "memorises drops images; of one that does not, it only says that some images are near to many."
    )
    head = ("class", "images", "draws", "distinct", "expected", "sd", "z")
    return Table("distinct", "Distinct nearest images", head, tuple(rows), note)


def _name(data: ReportData, label: int) -> str:
    return data.classes[label] if 0 <= label < len(data.classes) else str(label)
