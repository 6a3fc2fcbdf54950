"""The resolved config, by section."""

from typing import Any

from functa.tasks.report.blocks import ReportData, Section, Table
from functa.tasks.report.words import flattened, setting


def section(data: ReportData) -> Section | None:
    """Show a folded table for each section of the config; values outside a section come first."""
    top = {key: value for key, value in data.config.items() if not isinstance(value, dict)}
    parts = {"general": top} | {key: value for key, value in data.config.items() if isinstance(value, dict)}
    tables = tuple(_table(name, part) for name, part in parts.items() if part)
    return Section("config", "Config", "Every setting of this run, by section.", tables) if tables else None


def _table(name: str, part: dict[str, Any]) -> Table:
    rows = tuple((key, setting(value)) for key, value in flattened(part))
    return Table("", name, ("key", "value"), rows, folded=True)
