"""The command line that makes a config again: a preset and the settings that were changed."""

import json
import shlex
from typing import Any

from functa.flows.config.load import load_config
from functa.flows.config.presets import preset_names
from functa.flows.config.schema import PipelineConfig
from functa.tasks.evaluation.config import SLOW

MAX_SETTINGS = 12  # more make no command that a person would type


def command_line(config: PipelineConfig, root: str, from_root: str | None = None) -> str:
    """Return `functa run PRESET --set ... --root ...`; "" for a config that is not a preset with a few changes."""
    if config.name not in preset_names():
        return ""
    changed = _changes(load_config(config.name).model_dump(mode="json"), config.model_dump(mode="json"))
    if config.evaluation.quick:  # it sets these to null itself
        changed = {key: value for key, value in changed.items() if key not in [f"evaluation.{part}" for part in SLOW]}
    if len(changed) > MAX_SETTINGS:
        return ""
    words = ["functa", "run", config.name]
    for key, value in changed.items():
        words += ["--set", f"{key}={value if isinstance(value, str) and value else json.dumps(value)}"]
    words += ["--root", root, *(["--from", from_root] if from_root else [])]
    return shlex.join(words)


def _changes(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in now.items():
        known = before.get(key)
        if isinstance(value, dict) and isinstance(known, dict):
            found |= {} if f"{prefix}{key}" == "provenance" else _changes(known, value, f"{prefix}{key}.")
        elif value != known:
            found[f"{prefix}{key}"] = value
    return found
