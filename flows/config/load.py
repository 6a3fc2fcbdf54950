"""Read a preset or YAML file with overrides into a PipelineConfig."""

from pydantic import ValidationError

from functa.flows.config.explain import explain
from functa.flows.config.overrides import apply_override
from functa.flows.config.presets import read_preset
from functa.flows.config.schema import ConfigError, PipelineConfig
from functa.storage.places.address import open_location


def with_absolute_images(config: PipelineConfig) -> PipelineConfig:
    """Return the config with an absolute location of images: a record outlives the folder that a shell was in."""
    location = config.images.location
    if not location:
        return config
    images = config.images.model_copy(update={"location": open_location(location).uri})
    return config.model_copy(update={"images": images})


def load_config(preset: str, overrides: list[str] | None = None) -> PipelineConfig:
    """Read a preset's name or a YAML file's path, with KEY=VALUE overrides.

    Raises ConfigError, one line that names the key, the fault and the fix.
    """
    settings = read_preset(preset).settings
    for override in overrides or []:
        apply_override(settings, override)
    try:
        return PipelineConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(f"{preset}: {explain(error)}") from None
