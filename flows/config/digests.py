"""The stages of a config, and the digests by which finished work is recognised."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from graphlib import TopologicalSorter
from typing import Any

from pydantic import BaseModel

from functa.flows.config.schema import ConfigError, PipelineConfig
from functa.models.config import ONCE
from functa.storage.config import ImagesConfig
from functa.storage.texts import CHUNK
from functa.tasks.inference.ready.shipped import find
from functa.tasks.stage_table import STAGES


def stages_of(config: PipelineConfig) -> tuple[str, ...]:
    """Return the stages of this config, in order: a stage whose optional section is null is left out."""
    sections = {name: stage.optional_section for name, stage in STAGES.items()}
    return tuple(name for name, section in sections.items() if not section or getattr(config, section) is not None)


def levels(config: PipelineConfig) -> list[list[str]]:
    """Return the stages of this config by levels: those of one level read only earlier ones, and may run together."""
    sorter = TopologicalSorter({stage: inputs_of(config, stage) for stage in stages_of(config)})
    sorter.prepare()
    found: list[list[str]] = []
    while sorter.is_active():
        ready = sorter.get_ready()
        found.append([stage for stage in STAGES if stage in ready])
        sorter.done(*ready)
    return found


def inputs_of(config: PipelineConfig, stage: str) -> tuple[str, ...]:
    """Return the stages of this config whose outputs a stage reads."""
    return tuple(name for name in STAGES[stage].inputs if name in stages_of(config))


def require_stage(config: PipelineConfig, stage: str) -> None:
    """Raise ConfigError for a stage that this config does not have."""
    if stage not in stages_of(config):
        section = STAGES[stage].optional_section
        raise ConfigError(
            f"{config.name}: has no {STAGES[stage].command} stage, its {section} section is null; "
            f"give it one (--set {section}={{}} takes the defaults) or name another preset"
        )


def seed_of(config: PipelineConfig, stage: str) -> int:
    """Return the seed of a stage. Those that read the functaset may have their own, so that seeds share a functaset."""
    own = config.training_seed if "encode" in STAGES[stage].inputs else None
    return config.seed if own is None else own


def chain_digests(config: PipelineConfig) -> dict[str, str]:
    """Return for each stage a digest of its config and of its inputs' configs. Known before anything has run."""
    found: dict[str, str] = {}
    for stage in stages_of(config):
        inputs = {name: found[name] for name in inputs_of(config, stage)}
        found[stage] = digest({"config": stage_config(config, stage), "inputs": inputs})
    return found


def stage_config(config: PipelineConfig, stage: str) -> dict[str, Any]:
    """Return the keys that decide a stage's result, flat: {"field.width": 128, ...}."""
    flat: dict[str, Any] = {}
    for section in STAGES[stage].sections:
        value = seed_of(config, stage) if section == "seed" else getattr(config, section)
        flat |= settings(value, section) if isinstance(value, BaseModel) else {section: value}
    if (name := flat.get("field.pretrained")) is not None:  # its weights decide, not its name alone
        flat["field.pretrained"] = f"{name}@{find(name).digest}"
    return {key: value for key, value in flat.items() if not STAGES[stage].leaves_out(key)}


def before_quantization(encoding: Mapping[str, Any]) -> dict[str, Any]:
    """Return those keys of an encoding's config that decide its latents as they are before they are quantised."""
    later = ("encode.quantization.", "encode.calibration_images")
    return {key: value for key, value in encoding.items() if not key.startswith(later)}


def settings(model: BaseModel, prefix: str) -> dict[str, Any]:
    """Return the keys of a section that decide a result, flat: without those of the machine, and later ones unset."""
    flat: dict[str, Any] = {}
    for name, info in type(model).model_fields.items():
        marks = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        if marks.get("environment") or (marks.get("added") and getattr(model, name) == info.default):
            continue
        if isinstance(model, ImagesConfig) and not model.decides(name):
            continue
        value = getattr(model, name)
        if ONCE in marks:
            value = marks[ONCE] if value == info.default else str(value)
        if isinstance(value, BaseModel):
            flat |= settings(value, f"{prefix}.{name}")
        else:
            flat[f"{prefix}.{name}"] = json.loads(json.dumps(value))  # tuples become lists, as read back
    return flat


def digest_of_columns(tables: Sequence[Sequence[Sequence[Any]]]) -> str:
    """Return the digest of tables as lists of columns, whose JSON is never in memory as a whole."""
    found = hashlib.sha256(b"[")
    for number, table in enumerate(tables):
        found.update(b",[" if number else b"[")
        for place, column in enumerate(table):
            found.update(b",[" if place else b"[")
            for start in range(0, len(column), CHUNK):
                text = json.dumps(list(column[start : start + CHUNK]), separators=(",", ":"))
                found.update((("," if start else "") + text[1:-1]).encode())
            found.update(b"]")
        found.update(b"]")
    found.update(b"]")
    return found.hexdigest()[:16]


def digest(value: Any) -> str:
    """Return a digest of a JSON value as 16 hex digits, independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
