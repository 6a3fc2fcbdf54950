"""One file per section of the report: what an evaluator left in the run, as blocks to show. In reading order."""

from functa.tasks.evaluation import evaluators
from functa.tasks.report.blocks import ReportData, Section
from functa.tasks.report.sections import gate


def sections(data: ReportData) -> list[Section]:
    """Return the sections that this run has something for."""
    first = gate.section(data)
    drawn = [section for evaluator in evaluators.EVALUATORS for section in evaluator.draw(data)]
    return [*([] if first is None else [first]), *drawn]
