"""Every figure of metrics.json with its meaning, by group."""

from functa.tasks.evaluation.catalogue import groups
from functa.tasks.report.blocks import ReportData, Section, Table
from functa.tasks.report.words import Figure, figures


def section(data: ReportData) -> Section | None:
    """Show a folded table for each group."""
    found = figures(data.metrics)
    if not found:
        return None
    about = "Everything in metrics.json, by group: its name, its key, its value and what it means."
    tables = [_table(name, part) for name in groups() if (part := [each for each in found if each.group == name])]
    return Section("figures", "All figures", about, tuple(tables))


def _table(group: str, part: list[Figure]) -> Table:
    meanings = ["", *(figure.meaning for figure in part)]
    rows = tuple(
        (figure.name, figure.value, "" if figure.meaning == before else figure.meaning, figure.key)
        for figure, before in zip(part, meanings)  # one meaning for neighbours that share it
    )
    return Table("", group, ("figure", "value", "meaning", "key"), rows, folded=True)
