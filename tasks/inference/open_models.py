"""Open the trained models of a root, or of a folder that holds one of them."""

from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from functa.models.latents.normalize import Normalizer
from functa.storage.errors import StorageError
from functa.storage.functaset.functaset import Functaset
from functa.storage.places.address import open_location
from functa.storage.places.local import LocalLocation
from functa.storage.places.location import Location
from functa.storage.runs.stage_records import read_record
from functa.tasks import trained
from functa.tasks.inference.photographs.decode import field_of_photographs
from functa.tasks.inference.photographs.store import size_of
from functa.tasks.inference.ready.field import ReadyField, open_pair, ready_field
from functa.tasks.inference.trained_field import TrainedField
from functa.tasks.stage_output import stage_output
from functa.tasks.trained import field_of


class TrainedModel(NamedTuple):
    """A classifier or denoiser, the normalizer of its inputs, and what its training recorded."""

    model: nn.Module
    normalizer: Normalizer
    about: dict[str, Any]


def load_field(location: str | Path) -> TrainedField | ReadyField:
    """Load a ready-made field by its name, or the trained field of a root, a functaset or a checkpoint folder.

    A ready-made field (`functa fields` lists them; of your own, the path of its .json) takes images of any size,
    and so does the field in a functaset that `functa encode --field` made. Others take square images of the side that
    they were fitted to. Raises StorageError, one line that names the fault and the fix: nothing trained there, damaged,
    unreachable; UnknownField for what is no name and no folder.

        field = functa.load_field("functa-runs/digits")
        z = field.encode(images)
        images_again = field.decode(z)
    """
    ready = open_pair(str(location))
    if ready is not None:
        return ready
    opened = _location(location)
    if _is_root(opened):
        if _finished(opened, "encode"):  # also where only the functaset was copied
            return TrainedField(*field_of(Functaset.open(stage_output(opened, "encode"))))
        opened = stage_output(opened, "meta_train")
    elif opened.exists("zarr.json"):
        functaset = Functaset.open(opened)
        if size_of(functaset.fingerprint) is not None:
            return field_of_photographs(functaset)
        return TrainedField(*field_of(functaset))
    module, inner, about = trained.load_field(opened.uri)
    return TrainedField(module, inner, about["resolution"])


def load_ready_field(location: str | Path) -> ReadyField:
    """Load a field for images of any size from wherever load_field finds one.

    Raises StorageError for a field that knows one size only.
    """
    found = load_field(location)
    if isinstance(found, ReadyField):
        return found
    digest = trained.weights_digest({f"model.{key}": value.numpy() for key, value in found.module.state_dict().items()})
    return ready_field(str(location), found.module, found.inner, found.resolution, digest)


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
