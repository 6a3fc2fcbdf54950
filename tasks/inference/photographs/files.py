"""The image files of a folder, looked at before any is encoded: which can be read, and how large each is."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from functa.storage.config import ImagesConfig
from functa.storage.errors import StorageError
from functa.storage.images.files import BadImage, decode, is_colour
from functa.storage.images.source import read_threads
from functa.storage.places.location import Location
from functa.tasks.inference.classify import image_files
from functa.tasks.inference.photographs.store import Size
from functa.tasks.inference.ready.field import ReadyField

MAX_PIXELS: int = ImagesConfig.model_fields["max_pixels"].default


@dataclass(frozen=True)
class Photograph:
    """A readable image file: its name below the folder, its size upright, and the token of its version."""

    key: str
    size: Size
    token: str
    colour: bool


@dataclass(frozen=True)
class Folder:
    """The image files of a folder; those that cannot be read with the reason."""

    location: Location
    photographs: list[Photograph]
    bad: dict[str, str]

    def by_size(self) -> dict[Size, list[Photograph]]:
        """Return the photographs of each size, smallest first."""
        found: dict[Size, list[Photograph]] = {}
        for each in sorted(self.photographs, key=lambda each: each.size):
            found.setdefault(each.size, []).append(each)
        return found


def look_at(images: str, field: ReadyField) -> Folder:
    """Decode every image file of a folder (or the one file) once; return what they are.

    Raises StorageError where a field does not fit them: an image smaller than its patch, colour for a grey field. Grey
    images become colour ones of three equal channels for a field of colour.
    """
    location, keys = image_files(images)
    with ThreadPoolExecutor(read_threads()) as threads:
        seen = list(threads.map(lambda key: _look(location, key, field.image_channels), keys))
    photographs = [each for each in seen if isinstance(each, Photograph)]
    bad = {key: each for key, each in zip(keys, seen, strict=True) if isinstance(each, str)}
    for each in photographs:
        _check(location, each, field)
    if not photographs:
        key, reason = next(iter(bad.items()))
        raise StorageError(f"{images}: none of {len(bad)} image files can be read; the first: {key}: {reason}")
    return Folder(location, photographs, bad)


def pixels_of(location: Location, key: str, channels: int) -> tuple[np.ndarray, bytes]:
    """Return an image uint8 [H, W, C] and the bytes of its file. Raises BadImage, StorageError."""
    data = location.read(key)
    pixels = np.array(decode(data, channels, MAX_PIXELS))  # writable, as torch wants it
    return (pixels[..., None] if pixels.ndim == 2 else pixels), data


def _look(location: Location, key: str, channels: int) -> "Photograph | str":
    try:
        entry = location.entry(key)
        pixels, data = pixels_of(location, key, channels)
        colour = is_colour(data)
    except (BadImage, StorageError) as error:
        return str(error)
    if entry is None:
        return "no longer there"
    return Photograph(key, Size(*pixels.shape[:2]), entry.token, colour)


def _check(location: Location, each: Photograph, field: ReadyField) -> None:
    if min(each.size) < field.patch:
        raise StorageError(
            f"{location.uri}/{each.key}: {each.size} pixels are fewer than a patch of the field {field.name}, "
            f"{field.patch}x{field.patch}; leave the image out, or enlarge it"
        )
    if each.colour and field.image_channels == 1:
        raise StorageError(
            f"{location.uri}/{each.key}: is a colour image, and the field {field.name} knows grey ones only; choose a "
            f"field of 3 channels, or convert the images"
        )
