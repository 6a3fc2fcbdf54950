"""Preset files: where they are, how they are read, and how one extends another."""

import copy
import difflib
import functools
import os
from collections.abc import Iterable
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from functa.flows.config.schema import ConfigError, PipelineConfig
from functa.flows.config.yaml_values import read_yaml

MAX_PRESET_BYTES = 1 << 20

# Presets of ours first, those of the ready-made fields among them, then those of the paper's tables.
FOLDERS = (".", "ready", "paper")


class PresetFile(NamedTuple):
    """The content of a preset file: settings, purpose, and the time that a run takes."""

    settings: dict[str, Any]
    purpose: str
    time: str


@functools.cache
def _files() -> dict[str, Traversable]:
    """Map the names of the presets that come with the project to their files."""
    folders = [resources.files("functa.flows.presets") / folder for folder in FOLDERS]
    return {
        file.name.removesuffix(".yaml"): file
        for folder in folders
        for file in sorted(folder.iterdir(), key=lambda file: file.name)
        if file.name.endswith(".yaml")
    }


def preset_names() -> list[str]:
    """Return the names of the presets that come with the project: ours, then those of the paper's tables."""
    return list(_files())


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return ": did you mean ...?" with up to three similar names, or an empty string where none is similar."""
    close = [f"'{prefix}{each}'" for each in difflib.get_close_matches(name, list(known), n=3)]
    if not close:
        return ""
    *others, last = close
    return f": did you mean {', '.join(others)} or {last}?" if others else f": did you mean {last}?"


def read_preset(preset: str) -> PresetFile:
    """Read a preset by its name, or a YAML file by its path, with all that it extends.

    Raises ConfigError, one line, where a file cannot be read or extends what does not exist or itself.
    """
    return _read(preset, Path(), ())


def _read(preset: str, folder: Path, children: tuple[str, ...]) -> PresetFile:
    """Read a preset that the files `children` extend, one after the other; paths are relative to `folder`."""
    file, name = _find(preset, folder, children)
    path = os.path.realpath(str(file))
    if path in children:
        chain = " -> ".join(Path(each).name for each in (*children, path))
        raise ConfigError(f"{preset}: extends itself ({chain}); remove one `extends`")
    data = _mapping(preset, file)
    purpose, time = (str(data.pop(key, "")) for key in ("purpose", "time"))
    base = data.pop("extends", None)
    data.setdefault("name", name)
    if base is None:
        return PresetFile(data, purpose, time)
    if not isinstance(base, str):
        raise ConfigError(f"{preset}: extends: expected the name of a preset or a YAML file, got {base!r}")
    below = _read(base, Path(path).parent, (*children, path))
    try:
        return PresetFile(_extended(below.settings, data), purpose, time)
    except RecursionError:
        raise ConfigError(f"{preset}: a section contains itself; write it out") from None
    except ValueError as error:
        raise ConfigError(f"{preset}: '{error}' is a section in one file and a value in the other") from None


def _find(preset: str, folder: Path, children: tuple[str, ...]) -> tuple[Traversable, str]:
    """Return a preset's file and its default name."""
    if preset in _files():
        return _files()[preset], preset
    if preset.endswith((".yaml", ".yml")):
        return folder / preset, Path(preset).stem
    origin = f"{children[-1]}: extends " if children else ""
    raise ConfigError(
        f"{origin}unknown preset '{preset}'{nearest(preset, _files())}; `functa presets` lists them, "
        "and a file's name ends in .yaml"
    )


def _mapping(preset: str, file: Traversable) -> dict[str, Any]:
    try:
        if not file.is_file():
            fault = "is a folder" if file.is_dir() else "no such file"
            raise ConfigError(f"{preset}: {fault}; name a YAML file or a preset (`functa presets` lists them)")
        with file.open(encoding="utf-8") as opened:
            text = opened.read(MAX_PRESET_BYTES + 1)
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
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a date that does not exist
        raise ConfigError(f"{preset}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{preset}: a preset is a mapping of sections, such as 'field: {{width: 128}}'")
    return data


@functools.lru_cache(maxsize=4)
def _parsed(text: str) -> Any:
    """Parse once for all members of a sweep: parsing takes longer than everything else."""
    return read_yaml(text, PipelineConfig)


def _extended(base: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of `base` with those of `data` in their place, and the provenance of both."""
    own = data.pop("provenance", None)
    settings = {key: value for key, value in base.items() if key != "name"}
    for key, value in _leaves(data):
        set_key(settings, key, value)
    if isinstance(own, dict):
        for marked in [key for keys in own.values() if isinstance(keys, list) for key in keys]:
            forget_provenance(settings, str(marked))
        below = settings.setdefault("provenance", {})
        for kind, keys in own.items():
            both = isinstance(keys, list) and isinstance(below.get(kind, []), list)
            below[kind] = [*below.get(kind, []), *keys] if both else keys
    elif own is not None:
        settings["provenance"] = own
    return settings


def _leaves(data: dict[str, Any], above: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """Return (key, value) of everything that a file sets, keys as tuples."""
    found: list[tuple[tuple[str, ...], Any]] = []
    for key, value in data.items():
        nested = isinstance(value, dict) and value and key != "paper"
        found += _leaves(value, (*above, key)) if nested else [((*above, key), value)]
    return found


def set_key(settings: dict[str, Any], key: tuple[str, ...], value: Any) -> None:
    """Set a dotted key, which then no longer has the provenance that it had.

    A key of a null section asks for the section: its other settings are the defaults. Raises ValueError with the name
    of a part that is a value and has no keys.
    """
    here = settings
    for depth, part in enumerate(key[:-1], 1):
        step = here.setdefault(part, {})
        if step is None:
            step = here[part] = {}
            forget_provenance(settings, ".".join(map(str, key[:depth])))
        if not isinstance(step, dict):
            raise ValueError(part)
        here = step
    here[key[-1]] = value
    forget_provenance(settings, ".".join(map(str, key)))


def forget_provenance(settings: dict[str, Any], key: str) -> None:
    """Remove the marks of a key and of the keys below it: its value is no longer the preset's."""
    marks = settings.get("provenance")
    if not isinstance(marks, dict) or key.startswith("provenance"):
        return
    for kind, keys in marks.items():
        if isinstance(keys, list):
            marks[kind] = [marked for marked in keys if not f"{marked}.".startswith(f"{key}.")]
