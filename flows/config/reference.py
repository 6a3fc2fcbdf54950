"""Every setting of PipelineConfig as a row: for `functa show` and for the reference in the documentation."""

import json
from collections.abc import Iterator
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from functa.flows.config.schema import PipelineConfig
from functa.flows.config.yaml_values import choices_of, section_of

TYPES = {int: "integer", float: "number", str: "text", bool: "true or false"}
BOUNDS = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}", "min_length": "at least {} long"}
SECTION = "section, or null"
DESCRIPTIVE = ("paper", "provenance")  # describe a preset and set nothing


class Setting(NamedTuple):
    """One setting: its key for `--set`, what it takes, what it is when nothing is set, and what it is for."""

    key: str
    type: str
    default: str
    bounds: str
    description: str

    @property
    def section(self) -> str:
        """Return the section of the key; empty for the settings of the run itself (name, seeds)."""
        first, dot, _ = self.key.partition(".")
        return first if dot or self.type == SECTION else ""


def settings_reference() -> list[Setting]:
    """Return all settings in the order of the config, a section that may be null before its own settings."""
    return list(_settings(PipelineConfig, ""))


def section_description(section: str) -> str:
    """Return the first sentence of what a section of the config is."""
    model = section_of(PipelineConfig.model_fields[section].annotation)
    assert model is not None
    return (model.__doc__ or "").strip().splitlines()[0]


def _settings(model: type[BaseModel], prefix: str) -> Iterator[Setting]:
    for name, info in model.model_fields.items():
        key, section = f"{prefix}{name}", section_of(info.annotation)
        if key in DESCRIPTIVE:
            continue
        if section is None:
            yield Setting(key, _type(info.annotation), _default(info), _bounds(info), info.description or "")
            continue
        if NoneType in get_args(info.annotation):
            yield Setting(key, SECTION, _default(info), "", info.description or "")
        yield from _settings(section, f"{key}.")


def _type(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _type(get_args(annotation)[0])
    if origin is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if origin is tuple:
        parts = get_args(annotation)
        several = "list of" if parts[-1] is Ellipsis else str(len(parts))
        return f"{several} {_type(parts[0])}s"
    if origin is dict:
        return "mapping"
    choices = choices_of(annotation)
    if len(choices) > 1:
        types = " | ".join(_type(choice) for choice in choices if choice is not NoneType)
        return f"{types}, or null" if NoneType in choices else types
    return TYPES.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, BaseModel):
        return "section with its defaults"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) and value else json.dumps(value)


def _bounds(info: FieldInfo) -> str:
    parts = [form.format(f"{limit:g}" if isinstance(limit, float) else limit)
             for constraint in _constraints(info)
             for name, form in BOUNDS.items() if (limit := getattr(constraint, name, None)) is not None]  # fmt: skip
    return ", ".join(parts)


def _constraints(info: FieldInfo) -> list[Any]:
    """Return the constraints of a value and of the items of a list."""
    items = [arg for arg in get_args(info.annotation) if get_origin(arg) is Annotated]
    of_items = [each for item in items for each in get_args(item)[1:]]
    flat = [each for found in of_items for each in (found.metadata if isinstance(found, FieldInfo) else [found])]
    return [*info.metadata, *flat]
