"""PipelineConfig: flow parameter, UI form, YAML preset and command line at once; and the stages' digests."""

import copy
import difflib
import functools
import hashlib
import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from flows.fit import check_devices, check_micro_batches, check_sections
from flows.spelling import annotation_of, fields, read_value, read_yaml
from models.config import Config, FieldConfig, InnerConfig
from storage.config import ImagesConfig
from tasks.config import (
    SAMPLING_KEYS,
    DispatchConfig,
    EncodeConfig,
    MetaTrainConfig,
    TrainClassifierConfig,
    TrainDiffusionConfig,
)
from tasks.evaluation.config import EvaluationConfig, GateConfig

MAX_PRESET_BYTES = 1 << 20


class ConfigError(Exception):
    """Something is wrong with arguments or config alone: exit status 2."""


class ProvenanceConfig(Config):
    """Where a preset's settings come from. In the config, not in comments, so that it reaches `show` and every run.

    A key speaks for all below it that are not named themselves. An overridden key leaves its list: what a user chose
    is neither the paper's nor the preset's.
    """

    paper: tuple[str, ...] = Field((), description="Keys whose values the paper gives for this very row.")
    assumed: tuple[str, ...] = Field((), description="Keys on which the paper is silent for this row: our choice.")

    def of(self, key: str) -> str:
        """The mark of a dotted key, by the longest name above it: "paper", "assumed", or "" where nothing is said."""
        marks = {marked: kind for kind in ("paper", "assumed") for marked in getattr(self, kind)}
        parts = key.split(".")
        above = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        return next((marks[name] for name in above if name in marks), "")


def _titled(section: str) -> Callable[[dict[str, Any]], None]:
    """Names the two choices of a section that may be null: a form would show the name of our class."""

    def add(schema: dict[str, Any]) -> None:
        for choice, title in zip(schema["anyOf"], (section, "None")):
            choice["title"] = title

    return add


class PipelineConfig(Config):
    """Everything that a run is made of."""

    name: str = Field("unnamed", pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$", description="Name of the preset.")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="All randomness derives from it.")
    training_seed: int | None = Field(
        None,
        ge=0,
        le=2**31 - 1,
        description="Seed of what comes after the functaset: classifier, diffusion, samples; empty: seed.",
    )
    images: ImagesConfig = Field(ImagesConfig(), title="Images")
    field: FieldConfig = Field(FieldConfig(), title="Field")
    inner: InnerConfig = Field(InnerConfig(), title="Inner loop")
    meta_train: MetaTrainConfig = Field(MetaTrainConfig(), title="Meta-training")
    encode: EncodeConfig = Field(EncodeConfig(), title="Encoding")
    classifier: TrainClassifierConfig | None = Field(
        TrainClassifierConfig(),
        title="Classifier",
        description="Null: no classifier is trained.",
        json_schema_extra=_titled("Train a classifier"),
    )
    diffusion: TrainDiffusionConfig | None = Field(
        TrainDiffusionConfig(),
        title="Diffusion",
        description="Null: no diffusion model is trained.",
        json_schema_extra=_titled("Train a diffusion model"),
    )
    evaluation: EvaluationConfig = Field(EvaluationConfig(), title="Evaluation")
    gate: GateConfig = Field(GateConfig(), title="Quality gate")
    dispatch: DispatchConfig = Field(DispatchConfig(), title="Dispatch")
    paper: dict[str, float | str] = Field(
        {}, description="The paper's figures for this row, dB and percent, and its number of classes; no setting."
    )
    provenance: ProvenanceConfig = Field(ProvenanceConfig(), title="Provenance")

    @model_validator(mode="after")
    def _fits(self) -> "PipelineConfig":
        check_sections(self.images, self.field, self.meta_train)
        check_micro_batches({"meta_train": self.meta_train, "classifier": self.classifier, "diffusion": self.diffusion})
        check_devices(_trained_batches(self), self.dispatch.devices)
        return self

    @model_validator(mode="after")
    def _provenance_names_keys(self) -> "PipelineConfig":
        keys = self.provenance.paper + self.provenance.assumed
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"provenance names '{key}' twice")
            if annotation_of(PipelineConfig, key.split(".")) is Any:
                raise ValueError(f"provenance names '{key}', which is no key")
        return self


def _trained_batches(config: PipelineConfig) -> dict[str, int]:
    """The batch of every training that the config has, by its key; the pixel classifier is there to judge samples."""
    sections = {"meta_train": config.meta_train, "classifier": config.classifier, "diffusion": config.diffusion}
    if config.diffusion is not None:
        sections["evaluation.pixel_classifier"] = config.evaluation.pixel_classifier
    return {f"{name}.batch": section.batch for name, section in sections.items() if section is not None}


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
OPTIONAL = {"train_classifier": "classifier", "train_diffusion": "diffusion"}  # stages whose section may be null
# How samples are drawn: decides what is evaluated, not what is trained.
SAMPLING = tuple(f"diffusion.process.{key}" for key in SAMPLING_KEYS)


def stages_of(config: PipelineConfig) -> tuple[str, ...]:
    """The stages that this config has, in order: one whose section is null has none."""
    return tuple(stage for stage in STAGES if stage not in OPTIONAL or getattr(config, OPTIONAL[stage]) is not None)


def inputs_of(config: PipelineConfig, stage: str) -> tuple[str, ...]:
    """The stages whose outputs a stage reads, of those that this config has."""
    return tuple(name for name in INPUTS[stage] if name in stages_of(config))


def require_stage(config: PipelineConfig, stage: str) -> None:
    """Raises ConfigError for a stage that this config does not have."""
    if stage not in stages_of(config):
        section = OPTIONAL[stage]
        raise ConfigError(
            f"{config.name}: has no {stage.replace('_', '-')} stage, its {section} section is null; "
            f"give it one (--set {section}={{}} takes the defaults) or name another preset"
        )


def seed_of(config: PipelineConfig, stage: str) -> int:
    """The seed of a stage: what comes after the functaset may have one of its own, so that seeds share a functaset."""
    after = stage not in ("meta_train", "encode") and config.training_seed is not None
    return config.training_seed if after else config.seed  # type: ignore[return-value]


def chain_digests(config: PipelineConfig) -> dict[str, str]:
    """By stage: a digest of its config and of that of all that it reads. Known before anything has run."""
    found: dict[str, str] = {}
    for stage in stages_of(config):
        inputs = {name: found[name] for name in inputs_of(config, stage)}
        found[stage] = digest({"config": stage_config(config, stage), "inputs": inputs})
    return found


def stage_config(config: PipelineConfig, stage: str) -> dict[str, Any]:
    """The keys that decide a stage's result, flat: {"field.width": 128, ...}."""
    flat: dict[str, Any] = {}
    for section in SECTIONS[stage]:
        value = seed_of(config, stage) if section == "seed" else getattr(config, section)
        flat |= settings(value, section) if isinstance(value, BaseModel) else {section: value}
    if stage == "train_diffusion":
        return {key: value for key, value in flat.items() if key not in SAMPLING}
    if stage == "evaluate":  # the model itself is among its inputs, by digest
        return {key: value for key, value in flat.items() if not key.startswith("diffusion.") or key in SAMPLING}
    return flat


def settings(model: BaseModel, prefix: str) -> dict[str, Any]:
    """The keys of a section that decide a result, flat; those of the machine are left out."""
    flat: dict[str, Any] = {}
    for name, info in type(model).model_fields.items():
        extra = info.json_schema_extra
        if isinstance(extra, dict) and extra.get("environment"):
            continue
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            flat |= settings(value, f"{prefix}.{name}")
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
