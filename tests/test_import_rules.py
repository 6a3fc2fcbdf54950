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


def imported(path: Path, project: Path = PROJECT) -> set[str]:
    """First names of what a file imports; a relative import counts as what it leads to."""
    package = path.relative_to(project).parts[:-1]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: max(0, len(package) - node.level + 1)] if node.level else ()
            base = [*above, *(node.module.split(".") if node.module else ())]
            names |= {".".join([*base, alias.name]) for alias in node.names}
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize(
    ("statement", "names"),
    [
        ("import zarr.codecs, functa.flows.cli.main as cli", {"zarr", "flows"}),
        ("from functa.flows.cli.main import main", {"flows"}),
        ("from flows import cli", {"flows"}),
        ("from . import loop", {"tasks"}),
        ("from .loop import train", {"tasks"}),
        ("from .. import dispatch", {"tasks"}),
        ("from ..dispatch import train", {"tasks"}),
        ("from ... import flows", {"flows"}),
        ("from ...flows import cli", {"flows"}),
        ("def late():\n    from ...flows.cli import main", {"flows"}),
    ],
)
def test_every_way_to_import_is_seen(statement: str, names: set[str], tmp_path: Path) -> None:
    path = tmp_path / "tasks" / "training" / "late.py"
    path.parent.mkdir(parents=True)
    path.write_text(statement)
    assert imported(path, tmp_path) == names


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


def test_nothing_imports_by_a_name_that_no_reader_sees() -> None:
    for room in OURS:
        for path in (PROJECT / room).rglob("*.py"):
            text = path.read_text()
            assert "import_module(" not in text and "__import__(" not in text, path
