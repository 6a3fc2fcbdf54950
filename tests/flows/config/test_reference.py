"""The table of settings that `functa show` and the documentation print."""

from typing import Any

from functa.flows.config.load import load_config
from functa.flows.config.reference import DESCRIPTIVE, section_description, settings_reference

ROWS = {setting.key: setting for setting in settings_reference()}


def leaves(value: Any, prefix: str = "") -> list[str]:
    """Dotted keys of all settings of a config."""
    if not isinstance(value, dict):
        return [prefix]
    return [leaf for key, below in value.items() for leaf in leaves(below, f"{prefix}.{key}".lstrip("."))]


def test_every_setting_has_a_row_with_a_type_and_a_description() -> None:
    config = {key: value for key, value in load_config("digits").model_dump().items() if key not in DESCRIPTIVE}
    sections = {row.key for row in ROWS.values() if row.type == "section, or null"}
    assert set(leaves(config)) == set(ROWS) - sections
    assert [row.key for row in ROWS.values() if not (row.type and row.default and row.description)] == []
    assert {row.section for row in ROWS.values()} - {""} <= set(config)


def test_a_row_gives_type_default_and_bounds() -> None:
    assert ROWS["field.width"][1:4] == ("integer", "128", "≥ 4, ≤ 4096")
    assert ROWS["inner.compile"][1:4] == ("auto | on | off", "auto", "")
    assert ROWS["images.channels"][1:3] == ("1 | 3, or null", "null")
    assert ROWS["evaluation.bits"][1:4] == ("list of integers", "[8, 7, 6, 5, 4]", "≥ 1, ≤ 8")
    assert ROWS["inner.rates_clip"].type == "2 numbers, or null"
    assert ROWS["classifier"].section == "classifier"
    assert ROWS["classifier.model.width"].section == "classifier"
    assert ROWS["seed"].section == ""


def test_a_section_is_described_in_one_sentence() -> None:
    assert all(section_description(row.section) for row in ROWS.values() if row.section)
