"""Read a preset or YAML file with overrides into a PipelineConfig."""

from pydantic import ValidationError

from functa.flows.config.explain import explain
from functa.flows.config.presets import read_preset, set_key
from functa.flows.config.schema import ConfigError, PipelineConfig
from functa.flows.config.yaml_values import annotation_of, read_value


def load_config(preset: str, overrides: list[str] | None = None) -> PipelineConfig:
    """Read a preset's name or a YAML file's path, with KEY=VALUE overrides.

    Raises ConfigError, one line that names the key, the fault and the fix.
    """
    settings = read_preset(preset).settings
    for override in overrides or []:
        key, equals, text = override.partition("=")
        parts = tuple(key.strip().split("."))
        if not equals or not all(parts):
            raise ConfigError(f"--set {override}: expected KEY=VALUE, such as --set field.width=256")
        try:
            set_key(settings, parts, read_value(text, annotation_of(PipelineConfig, list(parts))))
        except ValueError as error:
            raise ConfigError(f"--set {override}: '{error}' is a value, not a section") from None
    try:
        return PipelineConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(f"{preset}: {explain(error)}") from None
