"""Open the trained models of a root, or of a folder that holds one of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from functa.models.config import InnerConfig
from functa.models.field.field import Field
from functa.models.latents.normalize import Normalizer
from functa.storage.errors import StorageError
from functa.storage.functaset.functaset import Functaset
from functa.storage.places.address import open_location
from functa.storage.places.local import LocalLocation
from functa.storage.places.location import Location
from functa.storage.runs.stage_records import read_record
from functa.tasks import trained
from functa.tasks.stage_output import stage_output
from functa.tasks.trained import field_of


@dataclass(frozen=True, eq=False)
class TrainedField:
    """A trained field, its inner loop's settings and the side of the square images that it was fitted to."""

    module: Field
    inner: InnerConfig
    resolution: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return (H, W, C) of the images that it encodes."""
        return self.resolution, self.resolution, self.module.image_channels

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Return (s, s, c) of an image's latent."""
        return self.module.config.latent_shape

    def __repr__(self) -> str:
        image, latent = ("x".join(map(str, shape)) for shape in (self.image_shape, self.latent_shape))
        return f"TrainedField(images {image} -> latents {latent})"


class TrainedModel(NamedTuple):
    """A classifier or denoiser, the normalizer of its inputs, and what its training recorded."""

    model: nn.Module
    normalizer: Normalizer
    about: dict[str, Any]


def load_field(location: str | Path) -> TrainedField:
    """Load the trained field of a root, of a functaset (which holds its field) or of a checkpoint folder.

    Raises StorageError, one line that names the fault and the fix: nothing trained there, damaged, unreachable.

        field = functa.load_field("functa-runs/digits")
        z = functa.encode(field, images)
    """
    opened = _location(location)
    if _is_root(opened):
        if _finished(opened, "encode"):  # also where only the functaset was copied
            return TrainedField(*field_of(Functaset.open(stage_output(opened, "encode"))))
        opened = stage_output(opened, "meta_train")
    elif opened.exists("zarr.json"):
        return TrainedField(*field_of(Functaset.open(opened)))
    module, inner, about = trained.load_field(opened.uri)
    return TrainedField(module, inner, about["resolution"])


def load_classifier(location: str | Path) -> TrainedModel:
    """Load the trained classifier of a root or of a checkpoint folder: (model, normalizer, about).

    model(normalizer.normalize(z)) maps latents float32 [n, s, s, c] to logits [n, K]; about["class_names"] names the
    classes. Raises StorageError: nothing trained there, damaged, unreachable.

        model, normalizer, about = functa.load_classifier("functa-runs/digits")
        logits = model(normalizer.normalize(torch.from_numpy(z)))
    """
    return TrainedModel(*trained.load_classifier(_output(location, "train_classifier")))


def load_denoiser(location: str | Path) -> TrainedModel:
    """Load the trained diffusion model of a root or of a checkpoint folder: (model, normalizer, about).

    model(x, t, labels) predicts, for noisy normalized latents x [n, s, s, c] at timesteps t [n], what about["process"]
    names; labels are class numbers [n], or None for an unconditional model. Weights are the averaged ones if
    training kept an average. Raises StorageError: nothing trained there, damaged, unreachable.

        model, normalizer, about = functa.load_denoiser("functa-runs/digits")
        prediction = model(x, t, labels)
    """
    return TrainedModel(*trained.load_denoiser(_output(location, "train_diffusion")))


def _output(location: str | Path, stage: str) -> str:
    opened = _location(location)
    return (stage_output(opened, stage) if _is_root(opened) else opened).uri


def _location(location: str | Path) -> Location:
    opened = open_location(str(location))
    if isinstance(opened, LocalLocation) and not Path(opened.uri).is_dir():
        raise StorageError(
            f"{opened.uri}: no such folder; name the root of a run, its functaset or the checkpoint folder of a model"
        )
    return opened


def _is_root(location: Location) -> bool:
    return read_record(location, "meta_train") is not None or read_record(location, "encode") is not None


def _finished(root: Location, stage: str) -> bool:
    record = read_record(root, stage)
    return record is not None and record.state == "finished"
