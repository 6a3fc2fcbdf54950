"""Stages and their times, images that were left out, and the lineage of everything made."""

import json
from collections.abc import Sequence
from typing import Any

from functa.tasks.report.blocks import Block, ReportData, Row, Section, Table
from functa.tasks.report.words import duration, number, stage_name

MAX_NAMED = 200  # bad inputs

LINEAGE = ("what", "name", "digest", "made_from", "when", "where")


def section(data: ReportData) -> Section | None:
    """Stages with their times, images that could not be read, the lineage by digest."""
    blocks: list[Block] = []
    if data.stages:
        blocks.append(Table("", "Stages", ("stage", "state", "time"), tuple(_stage(stage) for stage in data.stages)))
    bad, count = _bad_inputs(data)
    blocks += bad
    if data.lineage:
        rows = lineage_table(data.lineage)
        columns = tuple(column.replace("_", " ") for column in rows[0])
        shown = tuple(tuple(row.values()) for row in rows)
        blocks.append(Table("", "Lineage: what was made from what, by digest", columns, shown, folded=True))
    about = f"{count:,} {'image was' if count == 1 else 'images were'} left out" if count else ""
    about += f"; the first {MAX_NAMED} are named." if count > MAX_NAMED and bad else "." if count else ""
    if not count and data.stages:
        about = "No image was left out."
    return Section("provenance", "Stages and data", about, tuple(blocks)) if blocks else None


def _stage(stage: Row) -> tuple[Any, ...]:
    seconds = number(stage, "seconds")
    return (
        stage_name(str(stage.get("stage", ""))), str(stage.get("state", "")),
        "" if seconds is None else duration(seconds),
    )  # fmt: skip


def _bad_inputs(data: ReportData) -> tuple[list[Block], int]:
    count = max(len(data.bad_inputs), int(number(data.metrics, "bad_inputs") or 0))
    if not data.bad_inputs:
        return [], count
    rows = tuple((str(bad.get("key", "")), str(bad.get("reason", ""))) for bad in data.bad_inputs[:MAX_NAMED])
    return [Table("", "Images that could not be used", ("image", "reason"), rows)], count


def lineage_table(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Return rows with equal columns, all text: the known ones that occur, then whatever else the rows have."""
    keys = dict.fromkeys(key for row in rows for key in row)
    columns = [key for key in LINEAGE if key in keys] + [key for key in keys if key not in LINEAGE]
    return [{column: _cell(row.get(column)) for column in columns} for row in rows]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item) for item in value)
    return json.dumps(value, default=str) if isinstance(value, dict) else str(value)
