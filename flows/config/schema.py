"""PipelineConfig: flow parameter, UI form, YAML preset and command line at once."""

from collections.abc import Callable
from typing import Any

from pydantic import Field, model_validator

from functa.flows.config.consistency import check_devices, check_micro_batches, check_sections, check_shown_channel
from functa.flows.config.yaml_values import annotation_of
from functa.models.config import Config, FieldConfig, InnerConfig
from functa.storage.config import ImagesConfig
from functa.storage.errors import FunctaError
from functa.tasks.config import (
    DispatchConfig,
    EncodeConfig,
    MetaTrainConfig,
    TrainClassifierConfig,
    TrainDiffusionConfig,
    TrainingConfig,
)
from functa.tasks.dispatch.tracking.job import Tracking
from functa.tasks.evaluation.config import EvaluationConfig, GateConfig


class ConfigError(FunctaError):
    """Arguments or config are wrong, whatever the state of files and servers."""

    exit_status = 2


class ProvenanceConfig(Config):
    """The origin of a preset's settings. In the config, not in comments, so that it reaches `show` and every run.

    A key covers all below it that are not named themselves. An overridden key leaves its list: a user's choice is
    neither the paper's nor the preset's.
    """

    paper: tuple[str, ...] = Field((), description="Keys whose values the paper gives for this very row.")
    assumed: tuple[str, ...] = Field((), description="Keys on which the paper is silent for this row: our choice.")

    def of(self, key: str) -> str:
        """Return the mark of a dotted key, by the longest key that covers it: "paper", "assumed" or ""."""
        marks = {marked: kind for kind in ("paper", "assumed") for marked in getattr(self, kind)}
        parts = key.split(".")
        above = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        return next((marks[name] for name in above if name in marks), "")


def _titled(section: str) -> Callable[[dict[str, Any]], None]:
    """Name the two choices of a section that may be null: a form would show the name of a class."""

    def add(schema: dict[str, Any]) -> None:
        for choice, title in zip(schema["anyOf"], (section, "None")):
            choice["title"] = title

    return add


class PipelineConfig(Config):
    """All settings of a run."""

    name: str = Field("unnamed", pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$", description="Name of the preset.")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="All randomness derives from it.")
    training_seed: int | None = Field(
        None,
        ge=0,
        le=2**31 - 1,
        description="Seed of what comes after the functaset: classifier, diffusion, samples; null: seed.",
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
    tracking: Tracking | None = Field(
        None,
        description="Show the curves of the trainings in TensorBoard, MLflow or Weights & Biases too; null: in none of "
        "them. No result depends on it.",
    )
    paper: dict[str, float | str] = Field(
        {}, description="The paper's figures for this row, dB and percent, and its number of classes; no setting."
    )
    provenance: ProvenanceConfig = Field(ProvenanceConfig(), title="Provenance")

    @model_validator(mode="after")
    def _fits(self) -> "PipelineConfig":
        check_sections(self.images, self.field, self.meta_train)
        perturbation = self.evaluation.perturbation
        check_shown_channel(self.field, None if perturbation is None else perturbation.show_channel)
        check_micro_batches({"meta_train": self.meta_train, "classifier": self.classifier, "diffusion": self.diffusion})
        check_devices(_trained_batches(self), self.dispatch.devices, self.dispatch.nodes)
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
    """Return the batch of every training that the config has, by its key; the pixel classifier judges samples."""
    sections: dict[str, TrainingConfig | None] = {
        "meta_train": config.meta_train,
        "classifier": config.classifier,
        "diffusion": config.diffusion,
    }
    if config.diffusion is not None and config.evaluation.generation is not None:
        sections["evaluation.pixel_classifier"] = config.evaluation.pixel_classifier
    return {f"{name}.batch": section.batch for name, section in sections.items() if section is not None}
