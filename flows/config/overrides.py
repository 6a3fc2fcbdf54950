"""Parse `--set KEY=VALUE` and put the value into the settings of a preset."""

from typing import Any

from functa.flows.config.presets import set_key
from functa.flows.config.schema import ConfigError, PipelineConfig
from functa.flows.config.yaml_values import annotation_of, read_value


def apply_override(settings: dict[str, Any], override: str) -> None:
    """Set the key of KEY=VALUE in the settings, its value read by the key's type. Raises ConfigError."""
    key, equals, text = override.partition("=")
    parts = tuple(key.strip().split("."))
    if not equals or not all(parts):
        raise ConfigError(f"--set {override}: expected KEY=VALUE, such as --set field.width=256")
    try:
        set_key(settings, parts, read_value(text, annotation_of(PipelineConfig, list(parts))))
    except ValueError as error:
        raise ConfigError(f"--set {override}: '{error}' is a value, not a section") from None
