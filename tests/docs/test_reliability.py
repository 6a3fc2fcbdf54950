"""The page of faults and attacks: each row names tests that exist and run in test-faults or test-attacks."""

import ast
import re
from functools import cache

import pytest

from tests.helpers.docs.pages import DOCS, PROJECT

ROW = re.compile(r"^\| (S?\d+) \| (.+) \|$", re.MULTILINE)
ROWS = {number: re.split(r" *\| ?", cells) for number, cells in ROW.findall((DOCS / "reliability.md").read_text())}


def test_there_are_34_faults_and_13_attacks() -> None:
    assert list(ROWS) == [*map(str, range(1, 35)), *(f"S{number}" for number in range(1, 14))]


@pytest.mark.parametrize("number", ROWS)
def test_the_tests_of_a_row_exist_and_have_its_marker(number: str) -> None:
    fault, happens, tests, _ = ROWS[number]
    assert fault and happens
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", tests)
    assert named
    assert len(named) == tests.count("::")
    for file, test in named:
        assert ("attacks" if number.startswith("S") else "faults") in markers(file, test), f"{file}::{test}"


@cache
def markers(file: str, test: str) -> set[str]:
    """Return the markers of a test, its own and its file's. Raises ValueError if there is no such test."""
    text = (PROJECT / file).read_text()
    tree = ast.parse(text)
    of_file = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and "pytestmark" in ast.dump(node.targets[0])
    ]
    (function,) = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == test]
    sources = [ast.get_source_segment(text, node) or "" for node in (*of_file, *function.decorator_list)]
    return set(re.findall(r"mark\.(\w+)", " ".join(sources)))
