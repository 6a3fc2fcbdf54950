"""Imports run downwards only and never in circles: import-linter checks it by the contracts in pyproject.toml."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
PACKAGES = ("flows", "tasks", "models", "storage", "deploy")
MOST_ENTRIES = 14  # of a folder: more than a reader takes in at a glance


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the linter on the package `functa` in a folder, by that folder's pyproject.toml."""
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache", "--no-logo"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package with real folders in place of its links, for planting faults."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PROJECT / "functa", tmp_path / "functa", ignore=ignored)
    shutil.copy(PROJECT / "pyproject.toml", tmp_path)
    return tmp_path


def plant(folder: Path, *statements: tuple[str, str]) -> None:
    """Append each statement to the file of the module named with it."""
    for module, statement in statements:
        path = folder / f"{module.replace('.', '/')}.py"
        path.write_text(f"{path.read_text()}\n{statement}\n")


def test_the_project_keeps_its_import_rules() -> None:
    done = lint(PROJECT)
    assert done.returncode == 0, done.stdout
    assert "4 kept, 0 broken" in done.stdout


FORBIDDEN = {
    "functa.storage.errors -> functa.tasks.config": "def late():\n    import functa.tasks.config",
    "functa.models.config -> functa.flows.gate": "def late():\n    from ..flows import gate",
    "functa.models.latents.dropout -> functa.storage.errors": "from functa.storage.errors import StorageError",
    "functa.tasks.prefect_tasks -> functa.deploy.bootstrap": "import functa.deploy.bootstrap",
    "functa.storage.config -> torch": "def late():\n    import torch.nn as nn",
    "functa.storage.config -> diffusers": "import diffusers",
    "functa.models.field.sine -> prefect": "from prefect import flow",
    "functa.models.field.grid -> zarr": "import zarr.codecs",
}


def test_the_linter_refuses_forbidden_imports(copy: Path) -> None:
    plant(copy, *((chain.split(" -> ")[0], statement) for chain, statement in FORBIDDEN.items()))
    done = lint(copy)
    assert done.returncode == 1, done.stdout
    for chain in FORBIDDEN:
        assert chain in done.stdout, done.stdout


def test_the_linter_refuses_import_cycles(copy: Path) -> None:
    """Between two files of a folder, and between a file and a folder beside it."""
    for one, other in (("tasks.report.files", "tasks.report.pixels"), ("flows.gate", "flows.sweep.plan")):
        plant(copy, (f"functa.{one}", f"import functa.{other}"), (f"functa.{other}", f"import functa.{one}"))
    done = lint(copy)
    assert done.returncode == 1, done.stdout
    assert "3 kept, 1 broken" in done.stdout
    assert "No cycles are allowed in functa.tasks.report." in done.stdout
    assert "No cycles are allowed in functa.flows." in done.stdout


def sources() -> list[Path]:
    """Return every Python file of the product."""
    found = [path for package in PACKAGES for path in (PROJECT / package).rglob("*.py")]
    assert len(found) > 100
    return found


@pytest.mark.attacks
def test_nothing_unpickles_or_evaluates() -> None:
    """Hostile files find no way in: no pickle, no torch.load, no eval, no unsafe YAML.

    The weights of EfficientNet-Lite0 are tensors alone, from bytes whose digest was checked.
    """
    checked = 'torch.load(io.BytesIO(read_weights()), map_location="cpu", weights_only=True)'
    for path in sources():
        text = path.read_text().replace(checked, "")
        for way in ("torch.load(", "import pickle", "allow_pickle=True", "yaml.load(", " eval(", " exec("):
            assert way not in text, f"{path}: {way}"


@pytest.mark.attacks
def test_nothing_deletes_a_folder_with_everything_in_it() -> None:
    """No setting and no flag can aim a recursive removal: files are deleted one by one, by names that we wrote."""
    for path in sources():
        text = path.read_text()
        for way in ("rmtree", "recursive=True", "rm -r", "removedirs"):
            assert way not in text, f"{path}: {way}"


# Modules that these import are named in a table of the source: the public names, the stages, the evaluators, the image
# sources, the kinds of training, the feature spaces. None of them comes from a file or a config.
BY_TABLE = {
    "functa/__init__.py", "flows/stage_flow.py", "tasks/evaluation/evaluator.py", "storage/images/sources.py",
    "tasks/training/__main__.py", "tasks/evaluation/generation/spaces.py",
}  # fmt: skip


def test_nothing_imports_a_module_by_a_computed_name() -> None:
    for path in sources():
        if str(path.relative_to(PROJECT)) in BY_TABLE:
            continue
        text = path.read_text()
        assert "import_module(" not in text and "__import__(" not in text, path


@pytest.mark.parametrize("package", ["functa", *PACKAGES])
def test_no_source_folder_has_too_many_entries(package: str) -> None:
    """Preset files are data and may be many."""
    top = PROJECT / package
    for folder in [top, *(path for path in top.rglob("*") if path.is_dir() and path.name != "__pycache__")]:
        entries = [path.name for path in folder.iterdir() if path.name != "__pycache__"]
        if folder.is_relative_to(PROJECT / "flows" / "presets"):
            entries = [name for name in entries if not name.endswith(".yaml")]
        assert len(entries) <= MOST_ENTRIES, f"{folder}: {sorted(entries)}"
