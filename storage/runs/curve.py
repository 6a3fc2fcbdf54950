"""A training's curve, metrics.jsonl: one row a line."""

import json
from contextlib import suppress
from typing import Any

from functa.storage.places.location import Location

CURVE = "metrics.jsonl"

DIGITS = 15


def whole(digits: str) -> int | float:
    """Return a whole number of JSON; one that no float can hold exactly, which nothing counts to, as a float."""
    return int(digits) if len(digits) <= DIGITS else float(digits)


def read_curve(location: Location) -> list[dict[str, Any]]:
    """Return the rows, without those that are garbled: they cost a point of a curve, and nothing else."""
    if not location.exists(CURVE):
        return []
    rows = []
    for line in location.read(CURVE).decode(errors="replace").splitlines():
        with suppress(ValueError, RecursionError):
            row = json.loads(line, parse_int=whole)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows
