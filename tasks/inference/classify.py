"""Classify images with a root's field and classifier."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from functa.models.compute.device import choose_device
from functa.models.field.inner import InnerLoop
from functa.models.latents.normalize import Normalizer
from functa.storage.config import ImagesConfig
from functa.storage.errors import StorageError
from functa.storage.functaset.functaset import Functaset
from functa.storage.images.files import ENDINGS, BadImage, is_colour, is_hidden, is_image, left_out, read_image
from functa.storage.places.address import open_location
from functa.storage.places.local import LocalLocation
from functa.storage.places.location import Location
from functa.storage.runs.stage_records import read_record
from functa.tasks.inputs.pictures import as_float
from functa.tasks.stage_output import stage_output
from functa.tasks.trained import check_same_functaset, field_of, load_classifier, logits_of

BATCH = 64

TOP = 3

Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Judge:
    """A root's field and classifier, ready to classify images."""

    loop: InnerLoop
    model: nn.Module
    normalizer: Normalizer
    names: list[str]
    device: torch.device

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return (H, W, C) of the images that it classifies."""
        side, _ = self.loop.resolution
        return side, side, self.loop.field.image_channels

    def rows(self, images: Tensor) -> list[Row]:
        """Return {class, label, probability, top} for each image of [n, H, W, C] in [0, 1]."""
        z = self.loop.encode(images.to(self.device))
        logits = logits_of(self.model, self.normalizer.normalize(z)).float()
        return [_row(row, self.names) for row in torch.softmax(logits, -1).cpu()]


def open_judge(root: str, device: str = "auto") -> Judge:
    """Open a root's field and classifier. Raises StorageError: nothing trained there, or on another functaset."""
    location = open_location(root)
    functaset = Functaset.open(stage_output(location, "encode"))
    model, normalizer, meta = load_classifier(stage_output(location, "train_classifier").uri)
    check_same_functaset(functaset, meta, root, "classifier")
    field, inner, resolution = field_of(functaset)
    target = choose_device(device)
    loop = InnerLoop(field.to(target), inner, (resolution, resolution))
    names = meta.get("class_names") or [str(label) for label in range(meta["classes"])]
    return Judge(loop, model.to(target), normalizer.to(target), names, target)


def classify_images(
    root: str, images: str, device: str = "auto", note: Callable[[str], None] = lambda text: None
) -> Iterator[Row]:
    """Yield a row for each image file in a folder (or the one file), in the order of their names, as it is classified.

    {image, class, label, probability, top: [[class, probability], ...]}, or {image, error} for a file that cannot be
    read. An image is resized and cropped to the field's resolution like the training images, with the same limit of
    pixels; `note` is called once if that reduces one. Raises StorageError: nothing trained there, no image there, a
    classifier of another functaset.
    """
    folder, keys = image_files(images)
    reading = _reading(open_location(root))
    judge = open_judge(root, device)
    resolution, _, channels = judge.image_shape
    noted = False
    for start in range(0, len(keys), BATCH):
        part = keys[start : start + BATCH]
        pixels, errors, reduced = _read(folder, part, resolution, channels, reading)
        if reduced and not noted:
            kind = "grey" if channels == 1 else "colour"
            note(f"images are reduced to {resolution}x{resolution} {kind} pixels, the only ones that this model knows")
            noted = True
        for key, error, row in zip(part, errors, judge.rows(as_float(pixels)), strict=True):
            yield {"image": key, "error": error} if error else {"image": key} | row


def note_on_files(images: str) -> str:
    """Describe the files of a folder that classify_images leaves out; empty if there is none."""
    location = open_location(images)
    if isinstance(location, LocalLocation) and not Path(location.uri).is_dir():
        return ""
    return left_out(key for key in location.list() if not is_image(key) and not is_hidden(key))


def _row(probabilities: Tensor, names: list[str]) -> Row:
    top = [(names[int(i)], round(float(probabilities[i]), 4)) for i in probabilities.argsort(descending=True)[:TOP]]
    label = int(probabilities.argmax())
    return {"class": names[label], "label": label, "probability": top[0][1], "top": top}


def image_files(images: str) -> tuple[Location, list[str]]:
    """Return the folder of the files, and their names."""
    location = open_location(images)
    if isinstance(location, LocalLocation):
        path = Path(location.uri)
        if path.is_file():
            return open_location(str(path.parent)), [path.name]
        if not path.exists():
            raise StorageError(f"{images}: no such folder or file; name a folder of images, or one file")
    keys = sorted(filter(is_image, location.list()))
    if not keys:
        raise StorageError(f"{images}: no image is there ({', '.join(ENDINGS)}); name a folder of images, or one file")
    return location, keys


def _reading(root: Location) -> ImagesConfig:
    """Return the limit of an image's pixels and the decoder that the root was encoded with."""
    record = read_record(root, "encode")
    names = {f"images.{name}": name for name in ("max_pixels", "decoder")}
    return ImagesConfig.model_validate(
        {names[key]: value for key, value in record.config.items() if key in names} if record else {}
    )


def _read(
    folder: Location, keys: list[str], resolution: int, channels: int, reading: ImagesConfig
) -> tuple[np.ndarray, list[str], bool]:
    """Return images uint8 [n, H, W, ch], unreadable ones black, each one's error or "", and whether one was reduced."""
    pixels, errors = np.zeros((len(keys), resolution, resolution, channels), np.uint8), []
    reduced = False
    for row, key in enumerate(keys):
        try:
            data = folder.read(key)
            image = read_image(data, channels, reading.max_pixels, reading.decoder)
            pixels[row] = image.square(resolution)
            reduced = reduced or min(image.size) > resolution or (channels == 1 and is_colour(data))
            errors.append("")
        except (BadImage, StorageError) as error:
            errors.append(str(error))
    return pixels, errors, reduced
