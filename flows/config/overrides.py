"""Parse `--set KEY=VALUE` and put the value into the settings of a preset."""

from typing import Any

from functa.flows.config.presets import set_key
from functa.flows.config.schema import ConfigError, PipelineConfig
from functa.flows.config.yaml_values import annotation_of, fields, read_value


def apply_override(settings: dict[str, Any], override: str) -> None:
    """Set the key of KEY=VALUE in the settings, its value read by the key's type. Raises ConfigError."""
    key, equals, text = override.partition("=")
    parts = tuple(full_key(key.strip()).split("."))
    if not equals or not all(parts):
        raise ConfigError(f"--set {override}: expected KEY=VALUE, such as --set field.width=256")
    try:
        set_key(settings, parts, read_value(text, annotation_of(PipelineConfig, list(parts))))
    except ValueError as error:
        raise ConfigError(f"--set {override}: '{error}' is a value, not a section") from None


def full_key(key: str) -> str:
    """Return the full key for one without its middle sections, if only one fits: diffusion.timestep_ratio."""
    parts = key.split(".")
    if annotation_of(PipelineConfig, parts) is not Any:
        return key
    fitting = [known for known in _keys(PipelineConfig) if _leaves_out_of(parts, known.split("."))]
    return fitting[0] if len(fitting) == 1 else key  # else loading the config reports what is wrong with it


def _leaves_out_of(parts: list[str], known: list[str]) -> bool:
    left = iter(known)
    return (parts[0], parts[-1]) == (known[0], known[-1]) and all(part in left for part in parts)


def _keys(annotation: Any, prefix: str = "") -> list[str]:
    known = fields(annotation)
    return (
        [prefix] if not known else [key for name in known for key in _keys(known[name], f"{prefix}.{name}".lstrip("."))]
    )
