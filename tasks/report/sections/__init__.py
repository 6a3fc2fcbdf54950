"""One file per section of the report, its charts included."""

from functa.tasks.evaluation import evaluators
from functa.tasks.report.blocks import ReportData, Section
from functa.tasks.report.sections import config, figures, gate, provenance, training


def report_sections(data: ReportData) -> list[Section]:
    """Return the sections for which this run has data, in reading order."""
    measured = [section for evaluator in evaluators.EVALUATORS for section in evaluator.draw(data)]
    kept = [make(data) for make in (training.section, figures.section, provenance.section, config.section)]
    first = (gate.section(data), figures.beside_the_paper(data))
    return [section for section in (*first, *measured, *kept) if section is not None]
