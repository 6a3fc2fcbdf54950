"""One HTML page that opens from disk: a run's report, a sweep's, or a comparison."""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from functa.storage.errors import printable
from functa.tasks.report import chart_style, pixels, words
from functa.tasks.report.blocks import Drawing, Pictures, Pixels, ReportData, Section, Sheet, Table
from functa.tasks.report.overview.cards import Card, cards
from functa.tasks.report.overview.summary import TERMS, summary, warnings

MAX_ROWS = 200  # of a table whose length the data decides

MAX_SIDE = 256  # pixels; larger pictures are reduced for showing

WIDE_FROM = 6  # columns; such a table takes the page's width

LONG = 60  # letters of a cell that takes the page's width

LONG_CELL = 40  # letters of a cell that is wrapped

ABSENT = "\u2013"  # in place of a number that was not measured

_FIGURE = re.compile(r"[+\-\u2212]?\d")

# Chart colours that the page's own variables replace, so that a chart follows the reader's light or dark theme.
_THEME = {
    chart_style.INK: "ink", chart_style.PAPER: "panel", chart_style.FAINT: "line",
    chart_style.BLUE: "blue", chart_style.VERMILION: "vermilion",
    chart_style.GREEN: "green", chart_style.PURPLE: "purple",
}  # fmt: skip

# Control characters, halves of characters, and marks that reverse the text after them.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass(frozen=True)
class Page:
    """The parts of a page besides its sections."""

    title: str
    command: str = ""
    created: str = ""
    fingerprint: str = ""
    summary: str = ""
    warnings: tuple[str, ...] = ()
    cards: Sequence[Card] | None = None
    terms: tuple[tuple[str, str], ...] = ()
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Tile:
    """A picture as a data URI, what it is, and the line below it."""

    uri: str
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Panel:
    """One frame on the page: a chart, labelled rows of tiles above each other, or a table."""

    kind: Literal["chart", "strip", "gallery", "table"]
    title: str
    note: str = ""
    svg: Markup | None = None
    columns: int = 1
    strips: tuple[tuple[str, list[Tile]], ...] = ()
    head: Sequence[str] = ()
    rows: Sequence[Sequence[tuple[str, str]]] = ()  # each cell's text, and its class on the page


@dataclass(frozen=True)
class Shown:
    """A section, ready for the page: panels side by side, wide ones below them, then those that are folded."""

    anchor: str
    title: str
    about: str
    beside: bool  # the text is beside the only chart
    columns: int
    panels: list[Panel]
    wide: list[Panel]
    folded: list[Panel]


def write_report(data: ReportData, sections: Sequence[Section]) -> str:
    """Write a run's report. Names may hold anything: markup is escaped, control characters are spelt out."""
    fingerprint = data.metrics.get("fingerprint")
    page = Page(
        data.title, data.command, data.created, fingerprint if isinstance(fingerprint, str) else "", summary(data),
        warnings(data), cards(data), TERMS,
        {str(name): words.show(version) for name, version in data.versions.items()},
    )  # fmt: skip
    return write_page(page, sections)


def write_page(page: Page, sections: Sequence[Section]) -> str:
    """Write one HTML file that opens from disk and asks the network for nothing."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = [_shown(section) for section in sections]
    text = environment.get_template("page.html.j2").render(page=page, sections=shown)
    return _CONTROL.sub(lambda found: printable(found[0]), text)


def _shown(section: Section) -> Shown:
    panels, wide, folded = list[Panel](), list[Panel](), list[Panel]()
    for block in section.blocks:
        if isinstance(block, Table):
            target = folded if block.folded else wide if _is_wide(block) else panels
            target.append(Panel("table", block.title, block.note, head=block.columns, rows=_cells(block)))
        elif isinstance(block, Sheet):
            (wide if len(block.rows) == 1 else panels).extend(_strips(block))
        elif (svg := _inline(block)) is not None:
            panels.append(Panel("chart", block.title, block.note, svg))
    columns = _columns(panels)
    beside = bool(section.about) and [panel.kind for panel in panels] == ["chart"]
    return Shown(section.anchor, section.title, section.about, beside, columns, panels, wide, folded)


def _columns(panels: list[Panel]) -> int:
    """Choose the number of panels side by side at a desk's width such that rows are full."""
    narrow = all(panel.kind != "strip" for panel in panels)
    return 3 if narrow and len(panels) in (3, 5, 6, 9) else 2


def _is_wide(table: Table) -> bool:
    longest = max((len(cell) for row in table.rows for cell in row if isinstance(cell, str)), default=0)
    return len(table.columns) >= WIDE_FROM or longest > LONG


def _cells(table: Table) -> list[list[tuple[str, str]]]:
    """Return each cell's text and class; rows beyond MAX_ROWS are in the run's file alone."""
    rows = table.rows[:MAX_ROWS]
    numeric = [not all(isinstance(cell, str) for cell in column) for column in zip(*rows)]
    return [
        [
            (words.show(cell), "number") if not isinstance(cell, str)
            else (cell, "number" if cell == ABSENT and of_numbers else _class_of(cell))
            for cell, of_numbers in zip(row, numeric)
        ]
        for row in rows
    ]  # fmt: skip


def _class_of(cell: str) -> str:
    """Return the class of a cell of text: a figure with its unit is one line, a long text may be cut anywhere."""
    if len(cell) > LONG_CELL:
        return "long"
    if cell.lower() in ("failed", "crashed", "bad"):
        return "failed"
    return "figure" if _FIGURE.match(cell) else ""


def _strips(sheet: Sheet) -> list[Panel]:
    """Cut a sheet into strips that a phone's width can hold; a single row becomes a gallery of large tiles."""
    count = max(len(row.images) for row in sheet.rows)
    if len(sheet.rows) == 1:
        return [Panel("gallery", sheet.title, sheet.note, strips=(("", _tiles(sheet.rows[0], 0, count)),))]
    columns = min(sheet.columns or _tiles_across(sheet.rows[0].images), count)
    starts = range(0, count, columns)
    return [
        Panel(
            "strip", sheet.title if start == 0 else f"{sheet.title}, continued", sheet.note if start == 0 else "",
            columns=columns,
            strips=tuple((row.label, _tiles(row, start, start + columns)) for row in sheet.rows),
        )
        for start in starts
    ]  # fmt: skip


def _tiles(row: Pictures, start: int, end: int) -> list[Tile]:
    captions = [*row.captions] + [""] * len(row.images)
    return [
        Tile(_picture(image), f"{row.label} {number + 1}", captions[number])
        for number, image in enumerate(row.images[start:end], start)
    ]


def _picture(image: Pixels) -> str:
    return pixels.data_uri(pixels.png(pixels.fit(image, pixels.PIXEL_ART, MAX_SIDE)))


def _tiles_across(images: Pixels) -> int:
    side = max(images.shape[1:3])
    return 8 if side <= 32 else 4 if side <= 128 else 2


def _inline(drawing: Drawing) -> Markup | None:
    """Return an SVG file as an element of the page: identifiers made its own, colours made the page's."""
    if not drawing.svg:
        return None
    text = drawing.svg.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", text, count=1)
    prefix = base64.b16encode(drawing.name.encode("utf-8", "replace")).decode().lower()
    text = re.sub(r"<[^>]*>", lambda tag: _own_tag(tag[0], prefix), text)  # a name between tags stays as it is
    return Markup(text)  # noqa: S704 - matplotlib escaped its text


def _own_tag(tag: str, prefix: str) -> str:
    tag = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>s{prefix}-", tag)
    tag = re.sub(r"font-family: [^;\"]*", "font-family: inherit", tag)
    tag = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", tag)
    for colour, variable in _THEME.items():
        tag = tag.replace(colour, f"var(--{variable})")
    return tag
