"""What a report is made of. Every part may be missing: its section then says so or is absent."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class ReportData:
    """Everything that `tasks.report.html.write_report` shows. Pictures are uint8, C = 1 (grey) or 3 (RGB)."""

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
