"""What a section of the report is made of: drawings, sheets of pictures, tables. Each is also a file of the run."""

from dataclasses import dataclass
from typing import Any

from tasks.report.data import Pixels


@dataclass(frozen=True, eq=False)
class Drawing:
    """A chart: images/<name>.svg of the run, inlined in the report."""

    name: str
    title: str
    svg: bytes
    note: str = ""


@dataclass(frozen=True, eq=False)
class Pictures:
    """A row of pictures of one kind, uint8 [n, H, W, 1 or 3], each with a line below it or none."""

    label: str
    images: Pixels
    captions: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Sheet:
    """Rows of equally many pictures that belong together column by column: images/<name>.png of the run."""

    name: str
    title: str
    rows: tuple[Pictures, ...]
    note: str = ""
    columns: int | None = None
    """Pictures side by side; None: as many as their size allows."""


@dataclass(frozen=True, eq=False)
class Table:
    """Figures in rows: images/<name>.csv of the run. Numbers are shown as they stand: round them."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    note: str = ""


Block = Drawing | Sheet | Table


@dataclass(frozen=True, eq=False)
class Section:
    """A heading, what a reader must know, and blocks; `anchor` is its place in the page's address."""

    anchor: str
    title: str
    about: str
    blocks: tuple[Block, ...]
