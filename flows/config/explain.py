"""Describe in one line what pydantic finds wrong with a config: the key, the fault and the fix."""

import difflib
import re
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from functa.flows.config.presets import nearest
from functa.flows.config.reference import settings_reference
from functa.flows.config.schema import PipelineConfig
from functa.flows.config.yaml_values import annotation_of, fields, nullable_section

# Names by which other tools know what `extends` does here.
BASES = ("preset", "base", "defaults", "inherit", "inherits", "from")


SHOWN = 4  # faults in a message

LONGEST = 200  # letters of a key or a value in a message

SET_KEY = re.compile(r": set ([a-z_]+(?= to |=))")


def explain(error: ValidationError) -> str:
    """Describe the faults, unknown keys first, since they are the likely causes of the others."""
    faults: Sequence[Any] = sorted(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
    return "; ".join([*map(_describe, faults[:SHOWN]), *more])


def _describe(fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"])[:LONGEST]
    if fault["type"] == "extra_forbidden":
        return f"unknown key '{key}'{_suggestion(key)}"
    value = fault.get("input")
    got = f", got {value!r:.{LONGEST}}" if isinstance(value, str | int | float | bool | type(None)) else ""
    if fault["type"] in ("model_type", "model_attributes_type", "dict_type"):  # its message names a class of ours
        nullable = nullable_section(annotation_of(PipelineConfig, key.split(".")))
        return f"{key}: is a section of settings, so give {'null or ' if nullable else ''}a mapping of keys{got}"
    message = fault["msg"].removeprefix("Value error, ")
    if key and fault["type"] == "value_error":  # a section's own check names its keys alone
        message = SET_KEY.sub(rf": set {key}.\1", message)
    return f"{key}: {message[:1].lower()}{message[1:]}{got}" if key else message


def _suggestion(key: str) -> str:
    if key in BASES:
        return ": to start from a preset, write `extends: NAME`"
    return suggest_key(key) or f"; known: {', '.join(fields(_section(key)))}"


def suggest_key(key: str) -> str:
    """Return ": did you mean ...?" with the full keys of settings that an unknown key may mean, or an empty string.

    First the keys of its own section, then sections, and keys of any section, by their last name.
    """
    above, _, name = key.rpartition(".")
    similar = nearest(name, fields(_section(key)), f"{above}.") if above else ""
    if similar:
        return similar
    keys = keys_by_name() | {section: [section] for section in fields(PipelineConfig)}
    closest = difflib.get_close_matches(name, keys, n=1)
    found = keys[closest[0]] if closest else []
    if len(found) < 2:
        return f": did you mean '{found[0]}'?" if found else ""
    return f": did you mean one of {', '.join(found[:4])}{', ...' if found[4:] else ''}?"


def keys_by_name() -> dict[str, list[str]]:
    """Return the full keys of all settings by their last name: {"width": ["field.width", ...], ...}."""
    keys: dict[str, list[str]] = {}
    for setting in settings_reference():
        keys.setdefault(setting.key.rpartition(".")[2], []).append(setting.key)
    return keys


def _section(key: str) -> Any:
    """Return the type of the section in which a key would be."""
    above = key.rpartition(".")[0]
    return annotation_of(PipelineConfig, above.split(".")) if above else PipelineConfig
