"""Bytes and JSON documents that were right and then were changed, as hypothesis strategies."""

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

HOSTILE: list[Any] = [
    None, True, -1, 0, 1, 1 << 31, 1 << 63, 1 << 64, -(1 << 70), 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "..", "../../etc/passwd", "/etc/passwd", "s3://elsewhere/x", "\x00", "\ud800", "\x1b[31m", "9" * 400, [], {},
    [[]], [None], ["a", 1], {"": None}, {"a": {"b": []}},
]  # fmt: skip


def examples(quick: int) -> settings:
    """Return settings of one test: few examples, always the same, or as many as the nightly profile asks for."""
    nightly = settings.get_current_profile_name() == "nightly"
    return settings(
        max_examples=settings.default.max_examples if nightly and settings.default else quick,
        derandomize=not nightly, deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """Draw one of the seeds with up to six changes: bytes set, removed, doubled, numbers made extreme, the end cut."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.sampled_from([1, 2, 4, 8, 40]))
        kind = draw(st.sampled_from(["set", "number", "cut", "remove", "double", "splice"]))
        if kind == "set":
            data[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "number":
            value = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]))
            data[at : at + 4] = value.to_bytes(4, draw(st.sampled_from(["little", "big"])))
        elif kind == "cut":
            del data[at:]
        elif kind == "remove":
            del data[at : at + length]
        elif kind == "double":
            data[at:at] = data[at : at + length]
        else:
            other = draw(st.sampled_from(seeds))
            data[at : at + length] = other[at : at + length]
    return bytes(data)


@st.composite
def changed(draw: st.DrawFn, documents: Sequence[Any]) -> Any:
    """Draw one of the JSON documents with up to three values replaced, removed, added or nested deeply."""
    document = copy.deepcopy(draw(st.sampled_from(documents)))
    for _ in range(draw(st.integers(1, 3))):
        holder, key = draw(st.sampled_from(list(_places(document)) or [({}, "")]))
        kind = draw(st.sampled_from(["replace", "replace", "remove", "add", "nest", "swap"]))
        if kind == "remove" and isinstance(holder, dict):
            holder.pop(key, None)
        elif kind == "add" and isinstance(holder, dict):
            holder[draw(st.sampled_from(["more", "", "format", "version", "../x"]))] = copy.deepcopy(
                draw(st.sampled_from(HOSTILE))
            )
        elif kind == "nest":
            holder[key] = _nested(draw(st.sampled_from([5, 300, 5000])))
        elif kind == "swap":
            other, name = draw(st.sampled_from(list(_places(document)) or [({}, "")]))
            found = other.get(name) if isinstance(other, dict) else other[name]
            holder[key] = [] if isinstance(found, dict | list) else found
        else:
            holder[key] = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
    return document


def _places(value: Any) -> Any:
    """Yield (holder, key) of everything inside a document, at most ten levels down."""
    levels = [value]
    for _ in range(10):
        below: list[Any] = []
        for each in levels:
            items = each.items() if isinstance(each, dict) else enumerate(each) if isinstance(each, list) else ()
            for key, inner in items:
                yield each, key
                below.append(inner)
        levels = below


def _nested(depth: int) -> Any:
    found: Any = 1
    for _ in range(depth):
        found = [found]
    return found


def as_json(value: Any, seal: Callable[[Any], Any] = lambda value: value) -> bytes:
    """Return a document as JSON, NaN and all; one that is nested too deeply for Python's writer as text."""
    try:
        try:
            return json.dumps(seal(value)).encode()
        except ValueError:  # a number that is not finite
            return json.dumps(value).encode()
    except RecursionError:
        return b'{"a":' * 3000 + b"1" + b"}" * 3000
