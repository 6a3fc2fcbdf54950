"""Read a preset or YAML file with overrides into a PipelineConfig."""

import copy
from typing import Any

from pydantic import ValidationError

from functa.flows.config.explain import explain
from functa.flows.config.overrides import apply_override
from functa.flows.config.presets import forget_provenance, read_preset
from functa.flows.config.schema import ConfigError, PipelineConfig
from functa.storage.config import ImagesConfig
from functa.storage.images.sources import known_shape
from functa.storage.places.address import open_location
from functa.storage.runs.stage_records import StageRecord
from functa.tasks.inference.ready.shipped import find


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
    _take_ready_made(preset, settings, overrides or [])
    try:
        config = PipelineConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(f"{preset}: {explain(error)}") from None
    _refuse_unused_factor(preset, config)
    return config


def _take_ready_made(preset: str, settings: dict[str, Any], overrides: list[str]) -> None:
    """Put the settings of the ready-made field that field.pretrained names in place of the preset's own.

    Raises UnknownField; ConfigError where --set contradicts it, or the images' size or channels do not fit.
    """
    field = settings.get("field")
    name = field.get("pretrained") if isinstance(field, dict) else None
    if not isinstance(name, str):
        return
    for key in (override.partition("=")[0].strip() for override in overrides):
        if key.startswith(("field.", "inner.", "meta_train.")) and key not in ("field.pretrained", "inner.compile"):
            raise ConfigError(
                f"{preset}: --set {key} and field.pretrained={name} exclude each other: a ready-made field has "
                f"settings of its own and is not trained; leave one out"
            )
    record, inner = find(name), settings.get("inner")
    try:
        resolution, channels, _ = known_shape(ImagesConfig.model_validate(settings.get("images", {})))
    except ValidationError:
        return  # the config's own validation names the fault
    if resolution is None or resolution % record.patch:
        nearest = max(1, round((resolution or 256) / record.patch)) * record.patch
        raise ConfigError(
            f"{preset}: field.pretrained={name} codes patches of {record.patch}x{record.patch} pixels: set "
            f"images.resolution to a multiple of {record.patch}, such as {nearest}"
        )
    if channels not in (None, record.image_channels):
        raise ConfigError(
            f"{preset}: field.pretrained={name} knows images of {record.image_channels} channels, not {channels}: set "
            f"images.channels={record.image_channels}, or choose another field (`functa fields`)"
        )
    compiled = {"compile": inner["compile"]} if isinstance(inner, dict) and "compile" in inner else {}
    spatial = resolution // record.patch
    settings["field"] = record.field.model_dump(mode="json") | {"spatial": spatial, "pretrained": name}
    settings["inner"] = record.inner.model_dump(mode="json") | compiled
    settings["meta_train"] = {}
    for section in ("field", "inner", "meta_train"):
        forget_provenance(settings, section)


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
