"""Open what a training left: fields, classifiers and denoisers from their checkpoints."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from functa.models.config import ClassifierConfig, DenoiserConfig, FieldConfig, InnerConfig
from functa.models.field.field import Field
from functa.models.latents.classifier import (
    build_classifier,
    build_pixel_classifier,
)
from functa.models.latents.denoiser import build_denoiser
from functa.models.latents.normalize import Normalizer
from functa.storage.errors import StorageError
from functa.storage.functaset.functaset import Functaset
from functa.storage.places.address import open_location
from functa.storage.places.location import Location
from functa.storage.runs.checkpoints import Checkpoint, load_checkpoint
from functa.storage.runs.stage_records import StageRecord, output_location, read_record
from functa.storage.runs.weights import read_description, read_weights


def field_of(functaset: Functaset) -> tuple[Field, InnerConfig, int]:
    """The field that lies inside a functaset, its inner loop, the resolution it was fitted at.

    So a copied functaset decodes, and encodes, alone.
    """
    tensors, described, _ = functaset.field()
    inner = InnerConfig.model_validate(described["inner"])
    fitted = (described["resolution"],) * 2
    field = Field(FieldConfig.model_validate(described["field"]), inner, described["image_channels"], resolution=fitted)
    field.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in tensors.items()})
    return field.requires_grad_(False), inner, described["resolution"]


def stage_output(root: Location, stage: str) -> Location:
    """Where a finished stage's output is. Raises StorageError where it has not finished."""
    record: StageRecord | None = read_record(root, stage)
    # A functaset to which images are being added can be read as it was.
    going_on = record is not None and record.state == "running" and bool(record.output_digest)
    if record is None or not (record.state == "finished" or going_on):
        raise StorageError(f"{root.uri}: {stage.replace('_', '-')} has not finished there; run it first")
    return output_location(record, root)


def check_same_functaset(functaset: Functaset, meta: Mapping[str, Any], root: str, what: str) -> None:
    """Raises StorageError, naming what differs, where a model was trained on latents that mean something else.

    Later commits of the same functaset are as good.
    """
    trained, here = meta["functaset"]["fingerprint"], functaset.fingerprint
    if trained != here:
        keys = sorted(key for key in trained.keys() | here.keys() if trained.get(key) != here.get(key))
        raise StorageError(
            f"{root}: its {what} was trained on a functaset of another fingerprint ({', '.join(keys)} differ); "
            f"train it again"
        )


def logits_of(model: nn.Module, x: Tensor, batch: int = 1024) -> Tensor:
    """Logits [n, K] of inputs [n, ...], in evaluation mode, without gradients, on the model's device."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(part.to(device)) for part in x.split(batch)])
    model.train(training)
    return logits


def load_classifier(uri: str) -> tuple[nn.Module, Normalizer, dict[str, Any]]:
    """A trained classifier, the normaliser of its inputs, and what else was recorded of it."""
    weights, meta = trained_weights(uri, "classifier", "train-classifier")
    model = build_classifier(
        ClassifierConfig.model_validate(meta["model"]), tuple(meta["latent_shape"]), meta["classes"]
    )
    model.load_state_dict(weights)
    return model.requires_grad_(False).eval(), Normalizer.from_state(meta["normalizer"]), meta


def describe_denoiser(uri: str) -> dict[str, Any]:
    """What was recorded of a trained denoiser: process, latent shape, classes, functaset, config."""
    return trained_description(uri, "diffusion model", "train-diffusion")


def load_denoiser(uri: str) -> tuple[nn.Module, Normalizer, dict[str, Any]]:
    """A trained denoiser (averaged weights where there are), its normaliser, and what else was recorded of it."""
    weights, meta = trained_weights(uri, "diffusion model", "train-diffusion")
    model = build_denoiser(DenoiserConfig.model_validate(meta["model"]), tuple(meta["latent_shape"]), meta["classes"])
    model.load_state_dict(weights)
    return model.requires_grad_(False).eval(), Normalizer.from_state(meta["normalizer"]), meta


def load_field(uri: str, expected: FieldConfig | None = None) -> tuple[Field, InnerConfig, dict[str, Any]]:
    """A trained field, the inner loop it was trained with, and its checkpoint's metadata.

    Raises StorageError where there is no valid checkpoint, or one of another field than `expected`.
    """
    checkpoint = finished_checkpoint(uri, "field", "meta-train")
    inner = InnerConfig.model_validate(checkpoint.metadata["inner"])
    config = FieldConfig.model_validate(checkpoint.metadata["field"])
    refuse_other_field(uri, checkpoint.metadata, expected or config)
    side = checkpoint.metadata["resolution"]
    field = Field(config, inner, checkpoint.metadata["image_channels"], resolution=(side, side))
    field.load_state_dict(best_weights(checkpoint.tensors))
    return field.requires_grad_(False), inner, dict(checkpoint.metadata)


def refuse_other_field(uri: str, metadata: Mapping[str, Any], field: FieldConfig) -> None:
    """Raises StorageError, naming the keys that differ, where a checkpoint there is of another field."""
    stored = metadata["field"]
    differing = [
        f"{key} is {stored[key]} there and {value} here"
        for key, value in field.model_dump(mode="json").items()
        if key in stored and stored[key] != value
    ]
    if differing:
        raise StorageError(f"{uri}: holds another field ({', '.join(differing)}); name another place, or that config")


def load_pixel_classifier(uri: str) -> nn.Module:
    """The trained pixel classifier: .features(images [B, H, W, ch]) -> [B, features]."""
    checkpoint = finished_checkpoint(uri, "pixel classifier", "evaluate")
    model = build_pixel_classifier(*checkpoint.metadata["model"])
    model.load_state_dict(best_weights(checkpoint.tensors))
    return model.requires_grad_(False).eval()


def weights_digest(tensors: Mapping[str, np.ndarray]) -> str:
    """16 hex digits of the weights that will be used, by name, shape and bytes."""
    state = hashlib.sha256()
    for name, value in sorted(best_weights(tensors).items()):
        state.update(f"{name}{tuple(value.shape)}".encode() + value.contiguous().numpy().tobytes())
    return state.hexdigest()[:16]


def best_weights(tensors: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """The averaged weights of a checkpoint where there are some, else the plain ones."""
    prefix = "average." if any(k.startswith("average.") for k in tensors) else "model."
    return tensors_below({k: torch.from_numpy(v) for k, v in tensors.items()}, prefix)


def tensors_below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def trained_weights(uri: str, what: str, command: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(weights that are to be used, what they are) of a finished training: averaged ones where there are some.

    From the exported file, which is all that must be copied to use a model elsewhere; from the checkpoint where a
    training left none. Raises StorageError, naming the command to run, where there is neither.
    """
    exported = read_weights(open_location(uri))
    if exported is not None:
        return {name: torch.from_numpy(value) for name, value in exported.tensors.items()}, exported.metadata
    checkpoint = finished_checkpoint(uri, what, command)
    return best_weights(checkpoint.tensors), dict(checkpoint.metadata)


def trained_description(uri: str, what: str, command: str) -> dict[str, Any]:
    """What trained_weights says of them, without reading them where they were exported."""
    described = read_description(open_location(uri))
    return dict(finished_checkpoint(uri, what, command).metadata) if described is None else described


def finished_checkpoint(uri: str, what: str, command: str) -> Checkpoint:
    """The checkpoint of a finished run. Raises StorageError, naming the command to run, where there is none."""
    checkpoint = load_checkpoint(open_location(uri))
    if checkpoint is None:
        raise StorageError(f"{uri}: no {what} has been trained there; run `functa {command}` first")
    if not checkpoint.metadata.get("finished"):
        raise StorageError(
            f"{uri}: the newest valid checkpoint of the {what} is of step {checkpoint.step}, before training ended; "
            f"delete damaged checkpoints after it, if any, and run `functa {command}` again"
        )
    return checkpoint
