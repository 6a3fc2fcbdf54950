"""One file per section of the report: what an evaluator left in the run, as blocks to show. In reading order."""

from collections.abc import Callable

from functa.tasks.report.blocks import ReportData, Section
from functa.tasks.report.sections import (
    classification,
    compression,
    gate,
    generation,
    latents,
    memorization,
    perturbation,
    psnr,
)

SECTIONS: tuple[Callable[[ReportData], Section | None], ...] = (
    gate.section,
    psnr.section,
    compression.section,
    latents.section,
    perturbation.section,
    classification.section,
    generation.section,
    memorization.section,
)


def sections(data: ReportData) -> list[Section]:
    """The sections that this run has something for."""
    return [section for make in SECTIONS if (section := make(data)) is not None]
