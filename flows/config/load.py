"""Read a preset or YAML file with overrides into a PipelineConfig."""

import copy
import difflib
import functools
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from functa.flows.config.schema import ConfigError, PipelineConfig
from functa.flows.config.yaml_values import annotation_of, fields, read_value, read_yaml

MAX_PRESET_BYTES = 1 << 20


def preset_names() -> list[str]:
    """Names of the presets that come with the project."""
    return sorted(
        p.name.removesuffix(".yaml")
        for p in resources.files("functa.flows.presets").iterdir()
        if p.name.endswith(".yaml")
    )


def load_config(preset: str, overrides: list[str] | None = None) -> PipelineConfig:
    """A preset's name or a YAML file's path, with KEY=VALUE overrides.

    Raises ConfigError, one line that names the key, the fault and the mend.
    """
    data, origin = _read_preset(preset)
    for override in overrides or []:
        _apply(data, override)
    try:
        return PipelineConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{origin}: {_explain(error)}") from None


def _read_preset(preset: str) -> tuple[dict[str, Any], str]:
    names = preset_names()
    if preset in names:
        path: Any = resources.files("functa.flows.presets") / f"{preset}.yaml"
    elif preset.endswith((".yaml", ".yml")):
        path = Path(preset)
    else:
        raise ConfigError(f"unknown preset '{preset}'{_nearest(preset, names)}; presets: {', '.join(names)}")
    try:
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "no such file"
            raise ConfigError(f"{preset}: {what}; name a YAML file or one of: {', '.join(names)}")
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_PRESET_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{preset}: cannot be read ({error.strerror or error}); name a readable YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{preset}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None
    if len(text) > MAX_PRESET_BYTES:
        raise ConfigError(f"{preset}: larger than {MAX_PRESET_BYTES} bytes, which no preset is")
    try:
        data = copy.deepcopy(_parsed(text))
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a date that is none
        raise ConfigError(f"{preset}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{preset}: a preset is a mapping of sections, such as 'field: {{width: 128}}'")
    data.setdefault("name", preset if preset in names else Path(preset).stem)
    return data, preset


@functools.lru_cache(maxsize=4)
def _parsed(text: str) -> Any:
    """Once for all members of a sweep: YAML is read more slowly than all else is done."""
    return read_yaml(text, PipelineConfig)


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set {override}: expected KEY=VALUE, such as --set field.width=256")
    here = data
    for part in parts[:-1]:
        step = here.setdefault(part, {})
        if step is None:  # a key of a null section asks for the section: the rest are its defaults
            step = here[part] = {}
            _forget_provenance(data, ".".join(parts[: parts.index(part) + 1]))
        if not isinstance(step, dict):
            raise ConfigError(f"--set {override}: '{part}' is a value, not a section")
        here = step
    here[parts[-1]] = read_value(text, annotation_of(PipelineConfig, parts))
    _forget_provenance(data, ".".join(parts))


def _forget_provenance(data: dict[str, Any], key: str) -> None:
    """An overridden key, and whatever lies below it, is no longer as the preset had it."""
    marks = data.get("provenance")
    if not isinstance(marks, dict) or key.startswith("provenance"):
        return
    for kind, keys in marks.items():
        if isinstance(keys, list):
            marks[kind] = [marked for marked in keys if not f"{marked}.".startswith(f"{key}.")]


def _explain(error: ValidationError) -> str:
    """The first fault in one line, with the nearest name for an unknown key."""
    faults = error.errors()
    fault = faults[0]
    where = ".".join(str(p) for p in fault["loc"])
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    if fault["type"] == "extra_forbidden":
        known = _keys_beside(fault["loc"])
        return f"unknown key '{where}'{_nearest(str(fault['loc'][-1]), known)}{more}"
    message = fault["msg"].removeprefix("Value error, ")
    got = fault.get("input")
    shown = f", got {got!r}" if isinstance(got, str | int | float | bool | type(None)) else ""
    return f"{where}: {message[:1].lower()}{message[1:]}{shown}{more}" if where else message


def _keys_beside(loc: tuple[int | str, ...]) -> list[str]:
    return list(fields(annotation_of(PipelineConfig, [str(part) for part in loc[:-1]])))


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f": did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"
