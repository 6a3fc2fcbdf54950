"""Every figure of metrics.json with its meaning, by group."""

from functa.tasks.evaluation.catalogue import groups
from functa.tasks.report.blocks import ReportData, Section, Table
from functa.tasks.report.words import Figure, figures


def section(data: ReportData) -> Section | None:
    """Show a folded table for each group."""
    found = figures(data.metrics)
    if not found:
        return None
    about = (
        "Everything in metrics.json, by group: its name, its value, its key and what it means. "
        "A table that is wider than the page scrolls sideways."
    )
    tables = [_table(name, part) for name in groups() if (part := [each for each in found if each.group == name])]
    return Section("figures", "All figures", about, tuple(tables))


def _table(group: str, part: list[Figure]) -> Table:
    meanings = ["", *(figure.meaning for figure in part)]
    rows = tuple(
        (figure.name, figure.value, figure.key, "" if figure.meaning == before else figure.meaning)
        for figure, before in zip(part, meanings)  # one meaning for neighbours that share it
    )
    return Table("", group, ("figure", "value", "key", "meaning"), rows, folded=True)
