"""Read a preset or YAML file with overrides into a PipelineConfig."""

import copy

from pydantic import ValidationError

from functa.flows.config.explain import explain
from functa.flows.config.overrides import apply_override
from functa.flows.config.presets import read_preset
from functa.flows.config.schema import ConfigError, PipelineConfig
from functa.storage.places.address import open_location
from functa.storage.runs.stage_records import StageRecord


def recorded_config(record: StageRecord) -> PipelineConfig:
    """Return the config of the run that a stage's record is part of. Raises ValueError for one of no use any more."""
    settings = copy.deepcopy(record.pipeline)
    if "images" in settings:  # recorded before there was a choice
        settings["images"].setdefault("split", "stratified")
    return PipelineConfig.model_validate(settings)


def with_absolute_images(config: PipelineConfig) -> PipelineConfig:
    """Return the config with absolute paths of images and labels: a record outlives the folder that a shell was in."""
    paths = {"location": config.images.location, "labels": config.images.labels}
    absolute = {key: open_location(path).uri for key, path in paths.items() if path not in ("", "none")}
    return config.model_copy(update={"images": config.images.model_copy(update=absolute)})


def load_config(preset: str, overrides: list[str] | None = None) -> PipelineConfig:
    """Read a preset's name or a YAML file's path, with KEY=VALUE overrides.

    Raises ConfigError, one line that names the key, the fault and the fix.
    """
    settings = read_preset(preset).settings
    for override in overrides or []:
        apply_override(settings, override)
    try:
        config = PipelineConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(f"{preset}: {explain(error)}") from None
    _refuse_unused_factor(preset, config)
    return config


def _refuse_unused_factor(preset: str, config: PipelineConfig) -> None:
    """Raise ConfigError for a factor that the optimiser does not use; records of older versions may have one."""
    for name, section in (("meta_train", config.meta_train), ("classifier", config.classifier)):
        if section is not None and section.optimizer != "muon":
            unused = section.muon_factor != type(section).model_fields["muon_factor"].default
            if unused:
                raise ConfigError(
                    f"{preset}: {name}.muon_factor={section.muon_factor:g} has no effect with {name}.optimizer="
                    f"{section.optimizer}; set {name}.optimizer=muon too"
                )
