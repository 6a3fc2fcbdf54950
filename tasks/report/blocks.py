"""What a section of the report is made of: drawings, sheets of pictures, tables. Each is also a file of the run."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Drawing:
    """A chart: images/<name>.svg of the run, inlined in the report."""

    name: str
    title: str
    svg: bytes
    note: str = ""


@dataclass(frozen=True, eq=False)
class Pictures:
    """A row of pictures of one kind, uint8 [n, H, W, 1 or 3], each with a line below it or none."""

    label: str
    images: Pixels
    captions: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Sheet:
    """Rows of equally many pictures that belong together column by column: images/<name>.png of the run."""

    name: str
    title: str
    rows: tuple[Pictures, ...]
    note: str = ""
    columns: int | None = None
    """Pictures side by side; None: as many as their size allows."""


@dataclass(frozen=True, eq=False)
class Table:
    """Figures in rows: images/<name>.csv of the run. Numbers are shown as they stand: round them."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    note: str = ""


Block = Drawing | Sheet | Table


@dataclass(frozen=True, eq=False)
class Section:
    """A heading, what a reader must know, and blocks; `anchor` is its place in the page's address."""

    anchor: str
    title: str
    about: str
    blocks: tuple[Block, ...]


Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class ReportData:
    """Everything that `functa.tasks.report.page.write_report` shows. Pictures are uint8, C = 1 (grey) or 3 (RGB)."""

    title: str
    config: dict[str, Any] = field(default_factory=dict)
    """The resolved config, nested."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """metrics.json (design section 5). A figure that was never measured is absent."""
    curves: dict[str, list[Row]] = field(default_factory=dict)
    """Stage -> rows of metrics.jsonl: step and whatever was logged (loss, psnr, accuracy, lr, images_per_s, ...)."""
    originals: Pixels | None = None
    """[n, H, W, C]"""
    reconstructions: Pixels | None = None
    """[n, H, W, C], of the same images in the same order."""
    samples: Pixels | None = None
    """[n, H, W, C]"""
    sample_labels: list[str] | None = None
    psnr_per_image: npt.NDArray[np.floating[Any]] | None = None
    """[m], of the whole test split; m and its order are independent of the pictures shown."""
    classes: list[str] = field(default_factory=list)
    """Names of the image source's classes, by number."""
    arrays: dict[str, dict[str, npt.NDArray[Any]]] = field(default_factory=dict)
    """What evaluators left for the report, by file name: write_arrays(output, name, ...)."""
    lineage: list[Row] = field(default_factory=list)
    """Rows {what, name, digest, made_from, when, where}, in the order in which things were made."""
    bad_inputs: list[Row] = field(default_factory=list)
    """Rows {key, reason}. The keys are file names: hostile."""
    stages: list[Row] = field(default_factory=list)
    """Rows {stage, state, seconds}."""
    created: str = ""
    """ISO time."""
    versions: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    """The command line that makes this run again."""
