"""The parts of a report: sections of drawings, sheets of pictures and tables, most of them files of the run too."""

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
    """Figures in rows: images/<name>.csv of the run; without a name there is no file. Numbers are shown as given."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    note: str = ""
    folded: bool = False
    """Whether a reader has to open it: for reference, not for reading."""


Block = Drawing | Sheet | Table


@dataclass(frozen=True, eq=False)
class Section:
    """A heading, what a reader must know, and blocks; `anchor` is its fragment in the page's address."""

    anchor: str
    title: str
    about: str
    blocks: tuple[Block, ...]


Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class ReportData:
    """Everything that the report shows. Pictures are uint8, C = 1 (grey) or 3 (RGB)."""

    title: str
    config: dict[str, Any] = field(default_factory=dict)
    """The resolved config, nested."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """metrics.json. A figure that was never measured is absent."""
    curves: dict[str, list[Row]] = field(default_factory=dict)
    """Rows of metrics.jsonl by stage: step and whatever was logged (loss, psnr, learning_rate, images_per_s, ...)."""
    originals: Pixels | None = None
    """[n, H, W, C]"""
    reconstructions: Pixels | None = None
    """[n, H, W, C], of the same images in the same order."""
    samples: Pixels | None = None
    """[n, H, W, C]"""
    sample_labels: list[str] | None = None
    psnr_per_image: npt.NDArray[np.floating[Any]] | None = None
    """[m], of the whole test split; m and its order are independent of the pictures shown."""
    images_by_split: dict[str, int] = field(default_factory=dict)
    """How many images of each split were encoded, augmentations not counted."""
    classes: list[str] = field(default_factory=list)
    """Names of the image source's classes, by number."""
    arrays: dict[str, dict[str, npt.NDArray[Any]]] = field(default_factory=dict)
    """What evaluators wrote for the report, by file name: write_arrays(output, name, ...)."""
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
    """The command line that repeats this run."""
