"""What the text of an override or of a YAML scalar means, read as the type of the field that it is for."""

import re
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

EMPTY = ("", "~", "null", "none")  # spellings of None, where a field may be empty


def annotation_of(model: type[BaseModel], parts: list[str]) -> Any:
    """Type of the field that a dotted key names; Any for none."""
    annotation: Any = model
    for part in parts:
        annotation = fields(annotation).get(part, Any)
    return annotation


def fields(annotation: Any) -> dict[str, Any]:
    """Types of a section's fields by name, also where the section may be null; empty for what is no section."""
    section = section_of(annotation)
    return {} if section is None else {name: info.annotation for name, info in section.model_fields.items()}


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the model of a section, also of one that may be null; None for what is no section."""
    models = (each for each in choices_of(annotation) if isinstance(each, type) and issubclass(each, BaseModel))
    return next(models, None)


def choices_of(annotation: Any) -> tuple[Any, ...]:
    """Return the types that a union has, or the one type that it is."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _takes(annotation: Any) -> tuple[bool, bool]:
    """(text alone, None too): what a field of this type takes, as far as a value's spelling must be read for it."""
    choices = choices_of(annotation)
    values = [choice for choice in choices if choice is not NoneType]
    literals = [isinstance(x, str) for value in values if get_origin(value) is Literal for x in get_args(value)]
    texts = all(value is str or get_origin(value) is Literal for value in values) and all(literals)
    return texts, NoneType in choices


def read_value(text: str, annotation: Any) -> Any:
    """What KEY=TEXT means for a field of this type: text stays as it stands, `on` and `2024` included."""
    texts, nullable = _takes(annotation)
    if nullable and text.strip().lower() in EMPTY:
        return None
    if texts:
        return text
    try:
        value = read_yaml(text, annotation) if text.strip() else text
    except (yaml.YAMLError, RecursionError, ValueError):
        value = text
    # YAML 1.1 reads "1e-3" (no dot) as text; as a number is what everybody means.
    return _number(value)


def read_yaml(text: str, annotation: Any) -> Any:
    """YAML's value, except that scalars of text fields stay text: YAML 1.1 reads `off` as false, 2024 as a number."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        _refuse_surprises(node, set())
        _keep_texts(node, annotation)
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _keep_texts(node: yaml.Node | None, annotation: Any) -> None:
    known = fields(annotation) if isinstance(node, yaml.MappingNode) else {}
    for key, value in node.value if known else ():  # type: ignore[union-attr]
        if not isinstance(key, yaml.ScalarNode) or key.value not in known:
            continue
        texts, nullable = _takes(known[key.value])
        plain = isinstance(value, yaml.ScalarNode) and value.tag.startswith("tag:yaml.org,2002:")
        if plain and texts and not (nullable and value.value.lower() in EMPTY):
            value.tag = "tag:yaml.org,2002:str"
        _keep_texts(value, known[key.value])


def _refuse_surprises(node: yaml.Node | None, seen: set[int]) -> None:
    """A key given twice is a fault; 0100 is not 64 and 1:30 is not 90, whatever YAML 1.1 says."""
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        if number and (":" in node.value or re.match(r"[-+]?0[0-9_box]", node.value)):
            node.tag = "tag:yaml.org,2002:str"
    elif isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = sorted({key for key in keys if keys.count(key) > 1})
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
