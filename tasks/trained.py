"""Load trained models: fields, classifiers and denoisers from their checkpoints, and a functaset's own field."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from functa.models.config import ClassifierConfig, DenoiserConfig, FieldConfig, InnerConfig
from functa.models.field.field import Field
from functa.models.latents.classifier import build_classifier, build_pixel_classifier
from functa.models.latents.denoiser import build_denoiser, time_numbers
from functa.models.latents.normalize import Normalizer
from functa.storage.errors import StorageError
from functa.storage.functaset.functaset import Functaset
from functa.storage.places.address import open_location
from functa.storage.runs.checkpoints import Checkpoint, load_checkpoint
from functa.storage.runs.weights import read_description, read_weights


def load_field(uri: str) -> tuple[Field, InnerConfig, dict[str, Any]]:
    """Load a trained field from its checkpoint folder; return it, its inner loop's settings and its metadata.

    Raises StorageError if no training has finished there.
    """
    weights, metadata = _trained_weights(uri, "field", "meta-train")
    field, inner = _build_field(metadata, weights)
    return field, inner, metadata


def field_of(functaset: Functaset) -> tuple[Field, InnerConfig, int]:
    """Load the field that a functaset contains; return it, its inner loop's settings and the images' resolution.

    The inner loop is the one that encoded, whose steps may be more than those of the training. A functaset that was
    copied elsewhere can so be decoded and extended without its root.
    """
    tensors, described, _ = functaset.field()
    weights = {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}
    field, inner = _build_field(described, weights)
    steps = functaset.fingerprint.get("inner.steps", inner.steps)
    return field, inner.model_copy(update={"steps": steps}), described["resolution"]


def _build_field(described: Mapping[str, Any], weights: Mapping[str, Tensor]) -> tuple[Field, InnerConfig]:
    config, inner = FieldConfig.model_validate(described["field"]), InnerConfig.model_validate(described["inner"])
    side = described["resolution"]
    field = Field(config, inner, described["image_channels"], resolution=(side, side))
    field.load_state_dict(weights)
    return field.requires_grad_(False), inner


def load_classifier(uri: str) -> tuple[nn.Module, Normalizer, dict[str, Any]]:
    """Load a trained classifier from its folder; return it, the normaliser of its inputs and its metadata.

    It maps normalised latents [n, s, s, c] to logits [n, classes]. Raises StorageError without a finished training.
    """
    weights, meta = _trained_weights(uri, "classifier", "train-classifier")
    config = ClassifierConfig.model_validate(meta["model"])
    return _latent_model(build_classifier(config, tuple(meta["latent_shape"]), meta["classes"]), weights, meta)


def load_denoiser(uri: str) -> tuple[nn.Module, Normalizer, dict[str, Any]]:
    """Load a trained denoiser from its folder; return it, the normaliser of its latents and its metadata.

    Its weights are the averaged ones if training kept an average. Raises StorageError without a finished training.
    """
    weights, meta = _trained_weights(uri, *DENOISER)
    config = DenoiserConfig.model_validate(meta["model"])
    model = build_denoiser(config, tuple(meta["latent_shape"]), meta["classes"], time_numbers(weights))
    return _latent_model(model, weights, meta)


def _latent_model(
    model: nn.Module, weights: Mapping[str, Tensor], meta: dict[str, Any]
) -> tuple[nn.Module, Normalizer, dict[str, Any]]:
    model.load_state_dict(weights)
    return model.requires_grad_(False).eval(), Normalizer.from_state(meta["normalizer"]), meta


def load_pixel_classifier(uri: str) -> nn.Module:
    """Load the trained pixel classifier: .features(images [B, H, W, ch]) -> [B, features]. Raises StorageError."""
    checkpoint = finished_checkpoint(uri, "pixel classifier", "evaluate")
    model = build_pixel_classifier(*checkpoint.metadata["model"])
    model.load_state_dict(best_weights(checkpoint.tensors))
    return model.requires_grad_(False).eval()


DENOISER = ("diffusion model", "train-diffusion")  # its name, and the command that trains it


def describe_denoiser(uri: str) -> dict[str, Any]:
    """Return a trained denoiser's metadata (process, latent shape, classes, functaset, config), without its weights."""
    described = read_description(open_location(uri))
    return dict(finished_checkpoint(uri, *DENOISER).metadata) if described is None else described


def _trained_weights(uri: str, what: str, command: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a finished training's weights, averaged ones if there are any, and its metadata.

    They come from the exported file, which suffices to use a model elsewhere; from the checkpoint if there is none.
    """
    exported = read_weights(open_location(uri))
    if exported is not None:
        return {name: torch.from_numpy(value) for name, value in exported.tensors.items()}, exported.metadata
    checkpoint = finished_checkpoint(uri, what, command)
    return best_weights(checkpoint.tensors), dict(checkpoint.metadata)


def finished_checkpoint(uri: str, what: str, command: str) -> Checkpoint:
    """Return the checkpoint of a finished training. Raises StorageError, naming the command to run, without one."""
    checkpoint = load_checkpoint(open_location(uri))
    if checkpoint is None:
        raise StorageError(f"{uri}: no {what} has been trained there; run `functa {command}` first")
    if not checkpoint.metadata.get("finished"):
        raise StorageError(
            f"{uri}: the newest valid checkpoint of the {what} is of step {checkpoint.step}, before training ended; "
            f"delete damaged checkpoints after it, if any, and run `functa {command}` again"
        )
    return checkpoint


def best_weights(tensors: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Return the averaged weights of a checkpoint if there are any, else the plain ones."""
    prefix = "average." if any(k.startswith("average.") for k in tensors) else "model."
    return tensors_below({k: torch.from_numpy(v) for k, v in tensors.items()}, prefix)


def tensors_below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with the prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def weights_digest(tensors: Mapping[str, np.ndarray]) -> str:
    """Return 16 hex digits of a checkpoint's best weights: their names, shapes and bytes."""
    state = hashlib.sha256()
    for name, value in sorted(best_weights(tensors).items()):
        state.update(f"{name}{tuple(value.shape)}".encode() + value.contiguous().numpy().tobytes())
    return state.hexdigest()[:16]


def logits_of(model: nn.Module, x: Tensor, batch: int = 1024) -> Tensor:
    """Return logits [n, K] of inputs [n, ...] in evaluation mode, without gradients, on the model's device."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(part.to(device)) for part in x.split(batch)])
    model.train(training)
    return logits


def check_same_functaset(functaset: Functaset, meta: Mapping[str, Any], root: str, what: str) -> None:
    """Raise StorageError, naming what differs, if a model was trained on latents with another meaning.

    Later commits of the same functaset are fine.
    """
    trained, here = meta["functaset"]["fingerprint"], functaset.fingerprint
    if trained != here:
        keys = sorted(key for key in trained.keys() | here.keys() if trained.get(key) != here.get(key))
        raise StorageError(
            f"{root}: its {what} was trained on a functaset of another fingerprint ({', '.join(keys)} differ); "
            f"train it again"
        )


def refuse_other_field(uri: str, metadata: Mapping[str, Any], field: FieldConfig) -> None:
    """Raise StorageError, naming the keys that differ, if the checkpoint there is of another field."""
    stored = metadata["field"]
    differing = [
        f"{key} is {stored[key]} there and {value} here"
        for key, value in field.model_dump(mode="json").items()
        if key in stored and stored[key] != value
    ]
    if differing:
        raise StorageError(
            f"{uri}: holds another field ({', '.join(differing)}); choose another location, or that config"
        )
