"""The stages of a config, what each reads, and the digests by which finished work is recognised."""

import hashlib
import json
from typing import Any

from pydantic import BaseModel

from functa.flows.config.schema import ConfigError, PipelineConfig
from functa.tasks.config import (
    SAMPLING_KEYS,
)

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
