"""The generated pages hold everything that the code has, an addition included."""

import importlib.util
from dataclasses import replace
from types import ModuleType

import pytest

from functa.flows.config.presets import preset_names
from functa.flows.config.reference import settings_reference
from functa.tasks.evaluation.catalogue import catalogue
from functa.tasks.stage_table import STAGES
from tests.helpers.docs.pages import DOCS


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_in_the_repository_are_those_of_the_code(generate: ModuleType) -> None:
    old = [path for path, page in generate.PAGES.items() if (DOCS / path).read_text(encoding="utf-8") != page()]
    assert not old, f"{', '.join(old)}: run `make docs`, or python docs/generate.py, and commit them"


def test_every_setting_figure_preset_and_stage_has_its_row(generate: ModuleType) -> None:
    rows = {
        generate.settings_page: [setting.key for setting in settings_reference()],
        generate.metrics_page: list(catalogue()),
        generate.presets_page: preset_names(),
        generate.stages_page: [stage.command for stage in STAGES.values()],
    }
    for write, names in rows.items():
        page = write()
        assert [name for name in names if f"| `{name}` |" not in page] == []


def test_every_command_is_described(generate: ModuleType) -> None:
    page = generate.command_page()
    for command in ("run", "meta-train", "store", "sample", "sweep", "up"):
        assert f"\n### functa {command}\n" in page
    assert "#### functa store verify" in page


def test_an_added_stage_appears(generate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    added = replace(STAGES["encode"], name="count_rows", summary="Count the rows.", inputs=("encode",))
    monkeypatch.setitem(STAGES, "count_rows", added)
    assert "| `count-rows` | Count the rows. | `encode` |" in generate.stages_page()
