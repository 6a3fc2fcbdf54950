"""Imports run downwards only: flows -> tasks -> {models, storage}."""

import ast
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
MAY_IMPORT = {
    "models": {"models"},
    "storage": {"storage"},
    "tasks": {"tasks", "models", "storage"},
    "flows": {"flows", "tasks", "models", "storage"},
    "deploy": {"deploy", "flows"},
}
OURS = set(MAY_IMPORT)


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_lies_below(room: str) -> None:
    files = list((PROJECT / room).rglob("*.py"))
    assert files
    for path in files:
        assert imported(path) & OURS <= MAY_IMPORT[room], path


@pytest.mark.parametrize("room", ["models", "storage"])
def test_the_lower_rooms_know_no_orchestrator(room: str) -> None:
    foreign = {"prefect", "cyclopts"} | (
        {"zarr", "fsspec", "s3fs", "PIL"} if room == "models" else {"torch", "diffusers"}
    )
    for path in (PROJECT / room).rglob("*.py"):
        assert not imported(path) & foreign, path


def test_nothing_unpickles_or_evaluates() -> None:
    """Hostile files find no way in: no pickle, no torch.load, no eval, no unsafe YAML."""
    for room in OURS:
        for path in (PROJECT / room).rglob("*.py"):
            text = path.read_text()
            for way in ("torch.load(", "import pickle", "allow_pickle=True", "yaml.load(", " eval(", " exec("):
                assert way not in text, f"{path}: {way}"
