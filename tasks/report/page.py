"""A page of sections in the report's style, and the files that it is made of: of a sweep, or of a comparison."""

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from functa.tasks.evaluation.catalogue import groups
from functa.tasks.report import charts, pixels, words
from functa.tasks.report.blocks import Drawing, Pixels, ReportData, Row, Section, Sheet, Table
from functa.tasks.report.cards import cards
from functa.tasks.report.files import block_file
from functa.tasks.report.sections import sections


def write_page(title: str, sections: Sequence[Section], command: str = "", created: str = "") -> str:
    """One HTML file that opens from disk."""
    page: Any = new_environment().get_template("page.html.j2")
    data = ReportData(title=title, command=command, created=created)
    return spelt_out(page.render(data=data, sections=[shown_section(section) for section in sections], versions={}))


def page_files(sections: Sequence[Section]) -> dict[str, bytes]:
    """File name -> content of every chart, sheet and table of the sections."""
    return dict(block_file(block) for section in sections for block in section.blocks)


MAX_ROWS = 200  # of a table whose length the data decides

MAX_SIDE = 256  # pixels; larger pictures are reduced for showing

# Chart colours that the page's own variables replace, so that a chart follows the reader's light or dark theme.
_THEME = {
    charts.INK: "ink", charts.PAPER: "panel", charts.FAINT: "line",
    charts.BLUE: "blue", charts.VERMILION: "vermilion", charts.GREEN: "green", charts.PURPLE: "purple",
}  # fmt: skip

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class Tile:
    """A picture as a data URI, what it is, and the line below it."""

    uri: str
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Strip:
    """Up to a row's width of images: labelled rows of tiles above each other."""

    columns: int
    rows: list[tuple[str, list[Tile]]]


@dataclass(frozen=True)
class Chart:
    """A chart's title, its inlined SVG and a line of figures below."""

    title: str
    svg: Markup
    note: str = ""


@dataclass(frozen=True)
class Shown:
    """A section, ready for the page: its charts, sheets and tables."""

    anchor: str
    title: str
    about: str
    charts: list[Chart]
    sheets: list[tuple[str, str, list[Strip]]]
    tables: list[tuple[str, str, Sequence[str], list[list[tuple[str, bool]]]]]


def write_report(data: ReportData) -> str:
    """The page. Names may hold anything: markup is escaped, control characters and lone surrogates are spelt out."""
    factor, strips = _reconstructions(data)
    page = (
        new_environment()
        .get_template("report.html.j2")
        .render(
            data=data,
            cards=cards(data),
            factor=factor,
            strips=strips,
            samples=_samples(data),
            sample_width=_sample_width(data),
            curves=[chart for stage, rows in data.curves.items() for chart in _curves(stage, rows)],
            sections=[shown_section(section) for section in sections(data)],
            groups=_groups(data),
            stages=_stages(data.stages),
            lineage=lineage_table(data.lineage[:MAX_ROWS]),
            lineage_more=max(0, len(data.lineage) - MAX_ROWS),
            bad_inputs=data.bad_inputs[:MAX_ROWS],
            bad_count=max(len(data.bad_inputs), int(words.number(data.metrics, "bad_inputs") or 0)),
            config=_config(data.config),
            versions={str(name): words.show(version) for name, version in data.versions.items()},
        )
    )
    return spelt_out(page)


def new_environment() -> Environment:
    """What templates are rendered in: all that they are given is escaped, what they are not given is a fault."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": words.duration, "stage_name": words.stage_name}
    return environment


def spelt_out(page: str) -> str:
    """The page without control characters and lone surrogates: each is spelt out."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", page)


def shown_section(section: Section) -> Shown:
    """A section, ready for the page."""
    blocks = section.blocks
    drawings = [block for block in blocks if isinstance(block, Drawing)]
    return Shown(
        section.anchor,
        section.title,
        section.about,
        [Chart(b.title, svg, b.note) for b in drawings if (svg := _inline(b.svg, b.name)) is not None],
        [(b.title, b.note, _strips(b)) for b in blocks if isinstance(b, Sheet)],
        [(b.title, b.note, b.columns, _cells(b)) for b in blocks if isinstance(b, Table)],
    )


def _strips(sheet: Sheet) -> list[Strip]:
    count = max(len(row.images) for row in sheet.rows)
    columns = min(sheet.columns or _columns(sheet.rows[0].images), count)
    return [
        Strip(
            columns,
            [
                (row.label, _tiles(row.images[start : start + columns], row.label, start, row.captions[start:]))
                for row in sheet.rows
            ],
        )
        for start in range(0, count, columns)
    ]


def _cells(table: Table) -> list[list[tuple[str, bool]]]:
    """Each cell's text, and whether it is a number; rows beyond MAX_ROWS stand in the run's file alone."""
    return [
        [(cell if isinstance(cell, str) else words.show(cell), not isinstance(cell, str)) for cell in row]
        for row in table.rows[:MAX_ROWS]
    ]


def _reconstructions(data: ReportData) -> tuple[int, list[Strip]]:
    """The errors' amplification, and the pictures in strips that a phone's width can hold."""
    originals, reconstructions = data.originals, data.reconstructions
    if originals is None or reconstructions is None or not len(originals):
        return 1, []
    factor = pixels.amplification(originals, reconstructions)
    error = pixels.errors(originals, reconstructions, factor)
    decibels = [f"{value:.1f}" if value < 1000 else "\u221e" for value in pixels.psnr(originals, reconstructions)]
    columns = _columns(originals)
    strips = []
    for start in range(0, len(originals), columns):
        part = slice(start, start + columns)
        rows = [
            ("original", _tiles(originals[part], "original", start)),
            ("reconstruction", _tiles(reconstructions[part], "reconstruction", start)),
            (f"error \u00d7 {factor}, and PSNR in dB", _tiles(error[part], "error", start, decibels[part])),
        ]
        strips.append(Strip(columns, rows))
    return factor, strips


def _samples(data: ReportData) -> list[Tile]:
    if data.samples is None or not len(data.samples):
        return []
    labels = [str(label) for label in data.sample_labels or []]
    labels += [""] * (len(data.samples) - len(labels))
    return _tiles(data.samples, "sample", 0, labels)


def _sample_width(data: ReportData) -> int:
    """The least width of a sample in CSS pixels: its picture can be made out, its class name can be read."""
    if data.samples is None or not len(data.samples):
        return 0
    longest = max((len(str(label)) for label in data.sample_labels or []), default=0)
    return max(460 // _columns(data.samples), min(110, 7 * longest + 6))


def _tiles(images: Pixels, what: str, start: int, captions: Sequence[str] | None = None) -> list[Tile]:
    captions = [*(captions or [])] + [""] * len(images)
    encoded = [pixels.data_uri(pixels.png(pixels.fit(image, pixels.PIXEL_ART, MAX_SIDE))) for image in images]
    return [
        Tile(uri, f"{what} {start + place + 1}", caption)
        for place, (uri, caption) in enumerate(zip(encoded, captions, strict=False))
    ]


def _columns(images: Pixels) -> int:
    side = max(images.shape[1:3])
    return 8 if side <= 32 else 4 if side <= 128 else 2


def _curves(stage: str, rows: Sequence[Row]) -> list[Chart]:
    svg = _inline(charts.curves(rows), f"curves-{stage}")
    if svg is None:
        return []
    last = rows[-1]
    said = [f"{words.show(last['step'], 'count')} steps"] if "step" in last else []
    said += [f"{name} {words.show(last[key], unit)}" for key, name, unit in _LAST if last.get(key) is not None]
    return [Chart(words.stage_name(stage), svg, "At the end: " + " \u00b7 ".join(said))]


_LAST = (
    ("loss", "loss", "plain"), ("psnr", "PSNR", "dB"), ("accuracy", "accuracy", "share"),
    ("lr", "learning rate", "plain"), ("images_per_s", "", "rate"), ("seconds", "", "duration"),
)  # fmt: skip


def _inline(svg: bytes | None, name: str) -> Markup | None:
    """An SVG file as an element of the page: identifiers made its own, colours made the page's."""
    if svg is None:
        return None
    text = svg.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", text, count=1)
    prefix = base64.b16encode(name.encode("utf-8", "replace")).decode().lower()
    text = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>s{prefix}-", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    for colour, variable in _THEME.items():
        text = text.replace(colour, f"var(--{variable})")
    return Markup(text)  # noqa: S704 - matplotlib escaped its text


def _groups(data: ReportData) -> list[tuple[str, list[words.Figure]]]:
    found = words.figures(data.metrics)
    return [(name, part) for name in groups() if (part := [figure for figure in found if figure.group == name])]


def _stages(stages: Sequence[Row]) -> list[Row]:
    """Stages with the share of the longest, for a bar."""
    seconds = [words.number(stage, "seconds") for stage in stages]
    longest = max((value for value in seconds if value is not None), default=0.0) or 1.0
    return [
        {"stage": str(stage.get("stage", "")), "state": str(stage.get("state", "")), "seconds": value,
         "share": round(100 * (value or 0) / longest, 1)}
        for stage, value in zip(stages, seconds, strict=True)
    ]  # fmt: skip


def _config(config: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The config by section, each flat; values outside a section come first."""
    top = [(key, _setting(value)) for key, value in config.items() if not isinstance(value, dict)]
    sections = [(key, _flat(value)) for key, value in config.items() if isinstance(value, dict)]
    return ([("general", top)] if top else []) + sections


def _flat(section: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in section.items():
        nested = isinstance(value, dict) and value
        rows += _flat(value, f"{prefix}{key}.") if nested else [(f"{prefix}{key}", _setting(value))]
    return rows


def _setting(value: Any) -> str:
    return "not set" if value is None or value == "" else words.show(value, "exact")


LINEAGE = ("what", "name", "digest", "made_from", "when", "where")


def lineage_table(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Rows with equal columns, all text: the known ones that occur, then whatever else the rows have."""
    keys = dict.fromkeys(key for row in rows for key in row)
    columns = [key for key in LINEAGE if key in keys] + [key for key in keys if key not in LINEAGE]
    return [{column: _cell(row.get(column)) for column in columns} for row in rows]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item) for item in value)
    return json.dumps(value, default=str) if isinstance(value, dict) else str(value)
