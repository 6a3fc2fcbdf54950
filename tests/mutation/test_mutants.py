"""The mutants themselves: one fault each, named, and the explained ones still there."""

import ast
from pathlib import Path

import pytest

from tests.mutation.explained import EXPLAINED
from tests.mutation.mutants import mutants_of

PROJECT = Path(__file__).parents[2]
TOY = '''
"""A docstring."""
LIMIT = 3

def first(values: list[int], least: int = 2) -> int | None:
    """A docstring with 1 number."""
    for value in sorted(values):
        if value >= least and value != LIMIT:
            return value + 1
    raise ValueError(f"none of {len(values)} values")
'''


def test_every_mutant_has_one_fault_and_leaves_the_source_as_it_was() -> None:
    before = ast.unparse(ast.parse(TOY)).splitlines()
    found = {name: ast.unparse(tree).splitlines() for name, tree in mutants_of(TOY)}
    assert all(sum(a != b for a, b in zip(before, lines, strict=True)) == 1 for lines in found.values())
    assert list(found) == [
        "first: if value >= least and value != LIMIT: -> if not (value >= least and value != LIMIT):",
        "first: And in value >= least and value != LIMIT -> Or in value >= least and value != LIMIT",
        "first: GtE in value >= least -> Gt in value >= least",
        "first: NotEq in value != LIMIT -> Eq in value != LIMIT",
        "first: return value + 1 -> return None",
        "first: Add in value + 1 -> Sub in value + 1",
        "first: 1 -> 2",
        "first: raise ValueError(f'none of {len(values)} values') -> pass",
    ]


@pytest.mark.parametrize("file", EXPLAINED)
def test_every_survivor_that_is_explained_is_still_a_mutant(file: str) -> None:
    names = {name for name, _ in mutants_of((PROJECT / file).read_text())}
    assert set(EXPLAINED[file]) - names == set()
