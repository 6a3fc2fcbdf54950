"""A page of sections in the report's style, and the files that it is made of: of a sweep, or of a comparison."""

from collections.abc import Sequence
from typing import Any

from tasks.report.blocks import Section
from tasks.report.data import ReportData
from tasks.report.figures import block_file
from tasks.report.html import new_environment, shown_section, spelt_out


def write_page(title: str, sections: Sequence[Section], command: str = "", created: str = "") -> str:
    """One HTML file that opens from disk."""
    page: Any = new_environment().get_template("page.html.j2")
    data = ReportData(title=title, command=command, created=created)
    return spelt_out(page.render(data=data, sections=[shown_section(section) for section in sections], versions={}))


def page_files(sections: Sequence[Section]) -> dict[str, bytes]:
    """File name -> content of every chart, sheet and table of the sections."""
    return dict(block_file(block) for section in sections for block in section.blocks)
