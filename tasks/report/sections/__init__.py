"""One file per section of the report: what an evaluator left in the run, as blocks to show. In reading order."""

from collections.abc import Callable

from tasks.report.blocks import Section
from tasks.report.data import ReportData
from tasks.report.sections import classification, generation, psnr

SECTIONS: tuple[Callable[[ReportData], Section | None], ...] = (
    psnr.section,
    classification.section,
    generation.section,
)


def sections(data: ReportData) -> list[Section]:
    """The sections that this run has something for."""
    return [section for make in SECTIONS if (section := make(data)) is not None]
