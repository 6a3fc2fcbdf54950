"""Read the text of an override or of a YAML scalar as the type of the field that it is for."""

import re
from collections import Counter
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

EMPTY = ("", "~", "null", "none")  # spellings of None, where a field may be empty

OFF = ("off", "false", "no")  # and where a whole section may be left out


def annotation_of(model: type[BaseModel], parts: list[str]) -> Any:
    """Return the type of the field that a dotted key names; Any for none."""
    annotation: Any = model
    for part in parts:
        annotation = fields(annotation).get(part, Any)
    return annotation


def fields(annotation: Any) -> dict[str, Any]:
    """Return the types of a section's fields by name, also where it may be null; empty for what is no section."""
    section = section_of(annotation)
    return {} if section is None else {name: info.annotation for name, info in section.model_fields.items()}


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the model of a section, also of one that may be null; None for what is no section."""
    models = (each for each in choices_of(annotation) if isinstance(each, type) and issubclass(each, BaseModel))
    return next(models, None)


def choices_of(annotation: Any) -> tuple[Any, ...]:
    """Return the types that a union has, or the one type that it is."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def nullable_section(annotation: Any) -> bool:
    """Return whether a field is a section that may be null."""
    return section_of(annotation) is not None and NoneType in choices_of(annotation)


def _means_null(text: str, annotation: Any) -> bool:
    word = text.strip().lower()
    return (word in EMPTY and NoneType in choices_of(annotation)) or (word in OFF and nullable_section(annotation))


def _is_text(annotation: Any) -> bool:
    """Return whether a field of this type takes text alone, so that no spelling means anything else."""
    values = [choice for choice in choices_of(annotation) if choice is not NoneType]
    literals = [isinstance(x, str) for value in values if get_origin(value) is Literal for x in get_args(value)]
    return all(value is str or get_origin(value) is Literal for value in values) and all(literals)


def read_value(text: str, annotation: Any) -> Any:
    """Return the value of KEY=TEXT for a field of this type. Text stays as it is, `on` and `2024` included."""
    if _means_null(text, annotation):
        return None
    if _is_text(annotation):
        return text
    try:
        value = read_yaml(text, annotation) if text.strip() else text
    except (yaml.YAMLError, RecursionError, ValueError):
        value = text
    # YAML 1.1 reads "1e-3" (no dot) as text; as a number is what everybody means.
    return _number(value)


def read_yaml(text: str, annotation: Any) -> Any:
    """Return YAML's value, except that text fields stay text: YAML 1.1 reads `off` as false, 2024 as a number."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        _refuse_surprises(node, set())
        _keep_texts(node, annotation)
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _keep_texts(node: yaml.Node | None, annotation: Any) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    known = fields(annotation)
    for key, value in node.value if known else ():
        if not isinstance(key, yaml.ScalarNode) or key.value not in known:
            continue
        field = known[key.value]
        if isinstance(value, yaml.ScalarNode) and value.tag.startswith("tag:yaml.org,2002:"):
            null = _means_null(value.value, field)
            if null and nullable_section(field):
                value.tag = "tag:yaml.org,2002:null"
            elif not null and _is_text(field):
                value.tag = "tag:yaml.org,2002:str"
        _keep_texts(value, field)


def _refuse_surprises(node: yaml.Node | None, seen: set[int]) -> None:
    """Refuse a key given twice, and keep 0100 from being 64 and 1:30 from being 90, as in YAML 1.1."""
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        if number and (":" in node.value or re.match(r"[-+]?0[0-9_box]", node.value)):
            node.tag = "tag:yaml.org,2002:str"
    elif isinstance(node, yaml.MappingNode):
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        twice = sorted(key for key, times in keys.items() if times > 1)
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"'{twice[0]}' is given twice", node.start_mark)
        for key, value in node.value:
            _refuse_surprises(key, seen)
            _refuse_surprises(value, seen)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_surprises(item, seen)


def _number(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
