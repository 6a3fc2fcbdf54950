"""PipelineConfig: flow parameter, UI form, YAML preset and command line at once; and the stages' digests."""

import difflib
import hashlib
import json
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError

from models.config import Config, FieldConfig, InnerConfig
from storage.config import ImagesConfig
from tasks.config import (
    DispatchConfig,
    EncodeConfig,
    EvaluationConfig,
    MetaTrainConfig,
    TrainClassifierConfig,
    TrainDiffusionConfig,
)

MAX_PRESET_BYTES = 1 << 20
EMPTY = ("", "~", "null", "none")  # spellings of None, where a field may be empty


class ConfigError(Exception):
    """Something is wrong with arguments or config alone: exit status 2."""


class PipelineConfig(Config):
    """Everything that a run is made of."""

    name: str = Field("unnamed", pattern=r"^[A-Za-z0-9_.-]{1,64}$", description="Name of the preset.")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="All randomness derives from it.")
    images: ImagesConfig = Field(ImagesConfig(), title="Images")
    field: FieldConfig = Field(FieldConfig(), title="Field")
    inner: InnerConfig = Field(InnerConfig(), title="Inner loop")
    meta_train: MetaTrainConfig = Field(MetaTrainConfig(), title="Meta-training")
    encode: EncodeConfig = Field(EncodeConfig(), title="Encoding")
    classifier: TrainClassifierConfig = Field(TrainClassifierConfig(), title="Classifier")
    diffusion: TrainDiffusionConfig = Field(TrainDiffusionConfig(), title="Diffusion")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), title="Evaluation")
    dispatch: DispatchConfig = Field(DispatchConfig(), title="Dispatch")
    paper: dict[str, float | str] = Field({}, description="The paper's figures for this row; shown, never used.")


# The sections whose keys decide a stage's result, and the stages whose outputs it reads.
SECTIONS = {
    "meta_train": ("seed", "images", "field", "inner", "meta_train"),
    "encode": ("images", "field", "inner", "encode"),
    "train_classifier": ("seed", "classifier"),
    "train_diffusion": ("seed", "diffusion"),
    "evaluate": ("seed", "images", "diffusion", "evaluation"),
}
INPUTS = {
    "meta_train": (),
    "encode": ("meta_train",),
    "train_classifier": ("encode",),
    "train_diffusion": ("encode",),
    "evaluate": ("meta_train", "encode", "train_classifier", "train_diffusion"),
}
STAGES = tuple(SECTIONS)
# How samples are drawn: decides what is evaluated, not what is trained.
SAMPLING = tuple(f"diffusion.process.{key}" for key in ("sampler", "sampling_steps", "guidance", "clip", "variance"))


def stage_config(config: PipelineConfig, stage: str) -> dict[str, Any]:
    """The keys that decide a stage's result, flat: {"field.width": 128, ...}."""
    flat: dict[str, Any] = {}
    for section in SECTIONS[stage]:
        value = getattr(config, section)
        flat |= _flatten(value, section) if isinstance(value, BaseModel) else {section: value}
    if stage == "train_diffusion":
        return {key: value for key, value in flat.items() if key not in SAMPLING}
    if stage == "evaluate":  # the model itself is among its inputs, by digest
        return {key: value for key, value in flat.items() if not key.startswith("diffusion.") or key in SAMPLING}
    return flat


def _flatten(model: BaseModel, prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, info in type(model).model_fields.items():
        extra = info.json_schema_extra
        if isinstance(extra, dict) and extra.get("environment"):
            continue
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            flat |= _flatten(value, f"{prefix}.{name}")
        else:
            flat[f"{prefix}.{name}"] = json.loads(json.dumps(value))  # tuples become lists, as read back
    return flat


def digest(value: Any) -> str:
    """16 hex digits of a JSON value, independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def preset_names() -> list[str]:
    """Names of the presets that come with the project."""
    return sorted(
        p.name.removesuffix(".yaml") for p in resources.files("flows.presets").iterdir() if p.name.endswith(".yaml")
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
        path: Any = resources.files("flows.presets") / f"{preset}.yaml"
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
        data = _parse(text, PipelineConfig)
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a date that is none
        raise ConfigError(f"{preset}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{preset}: a preset is a mapping of sections, such as 'field: {{width: 128}}'")
    data.setdefault("name", preset if preset in names else Path(preset).stem)
    return data, preset


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set {override}: expected KEY=VALUE, such as --set field.width=256")
    here = data
    for part in parts[:-1]:
        step = here.setdefault(part, {})
        if not isinstance(step, dict):
            raise ConfigError(f"--set {override}: '{part}' is a value, not a section")
        here = step
    here[parts[-1]] = _value(text, _annotation(parts))


def _annotation(parts: list[str]) -> Any:
    """Type of the field that a key names; Any for none."""
    annotation: Any = PipelineConfig
    for part in parts:
        annotation = _fields(annotation).get(part, Any)
    return annotation


def _fields(annotation: Any) -> dict[str, Any]:
    """Types of a section's fields by name; empty for what is no section."""
    section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return {name: info.annotation for name, info in annotation.model_fields.items()} if section else {}


def _takes(annotation: Any) -> tuple[bool, bool]:
    """(text alone, None too): what a field of this type takes, as far as a value's spelling must be read for it."""
    choices = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    values = [choice for choice in choices if choice is not NoneType]
    literals = [isinstance(x, str) for value in values if get_origin(value) is Literal for x in get_args(value)]
    texts = all(value is str or get_origin(value) is Literal for value in values) and all(literals)
    return texts, NoneType in choices


def _value(text: str, annotation: Any) -> Any:
    """What KEY=TEXT means for a field of this type: text stays as it stands, `on` and `2024` included."""
    texts, nullable = _takes(annotation)
    if nullable and text.strip().lower() in EMPTY:
        return None
    if texts:
        return text
    try:
        value = _parse(text, annotation) if text.strip() else text
    except (yaml.YAMLError, RecursionError, ValueError):
        value = text
    # YAML 1.1 reads "1e-3" (no dot) as text; as a number is what everybody means.
    return _number(value)


def _parse(text: str, annotation: Any) -> Any:
    """YAML's value, except that scalars of text fields stay text: YAML 1.1 reads `off` as false, 2024 as a number."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        _keep_texts(node, annotation)
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _keep_texts(node: yaml.Node | None, annotation: Any) -> None:
    fields = _fields(annotation) if isinstance(node, yaml.MappingNode) else {}
    for key, value in node.value if fields else ():  # type: ignore[union-attr]
        if not isinstance(key, yaml.ScalarNode) or key.value not in fields:
            continue
        texts, nullable = _takes(fields[key.value])
        plain = isinstance(value, yaml.ScalarNode) and value.tag.startswith("tag:yaml.org,2002:")
        if plain and texts and not (nullable and value.value.lower() in EMPTY):
            value.tag = "tag:yaml.org,2002:str"
        _keep_texts(value, fields[key.value])


def _number(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


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
    return f"{where or 'config'}: {message[:1].lower()}{message[1:]}{shown}{more}"


def _keys_beside(loc: tuple[int | str, ...]) -> list[str]:
    model: Any = PipelineConfig
    for part in loc[:-1]:
        model = model.model_fields[str(part)].annotation
    return list(model.model_fields)


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f": did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"
