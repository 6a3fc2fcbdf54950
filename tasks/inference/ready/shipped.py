"""Ready-made fields as files: NAME.safetensors with the tensors, NAME.json with settings, digest and card.

Those of the package lie in models/ready; anybody can keep others elsewhere. Free of torch.
"""

import difflib
import hashlib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from functa.models.config import Config, FieldConfig, InnerConfig
from functa.storage.errors import DamagedObject, FunctaError, StorageError
from functa.storage.places.address import open_location, read_json, write_json
from functa.storage.places.local import LocalLocation
from functa.storage.places.location import Location
from functa.storage.runs.weights import packed, unpacked

FOLDER = str(Path(str(resources.files("functa.models"))) / "ready")

ENDINGS = (".json", ".safetensors")

MOST_BYTES, MOST_BYTES_TOGETHER = 3 << 20, 15 << 20  # of the fields that the package ships


class UnknownField(FunctaError):
    """No field of that name is shipped."""

    exit_status = 2


class Card(Config):
    """The facts that a user needs before relying on a field; figures are named with their unit."""

    data: str
    training: str
    command: str
    figures: dict[str, float] = {}
    limits: str
    licence: str


class ReadyRecord(Config):
    """The JSON beside a field's tensors. `field` is that of one patch: its `spatial` is 1."""

    format: Literal[1] = 1
    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$")
    field: FieldConfig
    inner: InnerConfig
    image_channels: Literal[1, 3]
    patch: int = Field(ge=1, le=4096, description="Pixels a side of the patch of one latent position.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)
    card: Card

    @property
    def digest(self) -> str:
        """Return 16 hex digits that identify the tensors."""
        return self.sha256[:16]

    @property
    def about(self) -> str:
        """Return its size in words."""
        values = self.patch**2 * self.image_channels
        kind = "colour" if self.image_channels == 3 else "grey"
        return f"{self.field.channels} numbers for each {self.patch}x{self.patch} {kind} pixels ({values} values)"


def names() -> list[str]:
    """Return the names of the fields that the package ships."""
    return sorted(path.stem for path in Path(FOLDER).glob("*.json"))


def find(name: str) -> ReadyRecord:
    """Return the record of a shipped field. Raises UnknownField with the nearest name, DamagedObject."""
    known = names()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        near = f": did you mean '{close[0]}'?" if close else ": no folder of that name is there, and"
        raise UnknownField(f"unknown field '{name}'{near} `functa fields` lists the ready-made ones")
    return read_record(open_location(FOLDER), name)


def pair_of(text: str) -> tuple[Location, str] | None:
    """Return folder and name of the pair of files that a path names, by either of them; None for another path."""
    for ending in ENDINGS:
        if text.endswith(ending):
            folder, _, name = text.removesuffix(ending).rpartition("/")
            return open_location(folder or "."), name
    return None


def read_record(folder: Location, name: str) -> ReadyRecord:
    """Return the record beside a field's tensors. Raises MissingObject, DamagedObject."""
    uri = f"{folder.uri}/{name}.json"
    try:
        record = ReadyRecord.model_validate(read_json(folder, f"{name}.json"))
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "the document"
        raise DamagedObject(
            f"{uri}: does not describe a field of this version ({where}: {fault['msg']}); restore it from a copy"
        ) from None
    if record.field.spatial != 1 or not record.field.independent or record.field.coordinates != "patch":
        raise DamagedObject(f"{uri}: does not describe a field of single patches; restore it from a copy")
    return record


def read_tensors(folder: Location, name: str, record: ReadyRecord) -> dict[str, np.ndarray]:
    """Return the tensors as float32. Raises MissingObject, and DamagedObject where they are not the record's."""
    key, fix = f"{name}.safetensors", "install the package again, or restore the file from a copy"
    data = folder.read(key)
    if len(data) != record.bytes or hashlib.sha256(data).hexdigest() != record.sha256:
        raise DamagedObject(f"{folder.uri}/{key}: was altered (its digest does not match {name}.json); {fix}")
    return {name: value.astype(np.float32) for name, value in unpacked(data, f"{folder.uri}/{key}", fix).items()}


def write_pair(folder: Location, tensors: Mapping[str, np.ndarray], described: Mapping[str, Any]) -> ReadyRecord:
    """Write a field's two files, the record last; return it. Raises StorageError for one too large to be shipped."""
    data = packed(tensors)
    record = ReadyRecord.model_validate({**described, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)})
    if len(data) > MOST_BYTES:
        raise StorageError(
            f"{record.name}: {len(data)} bytes of tensors, and a ready-made field has {MOST_BYTES} at most; "
            f"train one of smaller field.width or field.depth"
        )
    folder.write(f"{record.name}.safetensors", data)
    write_json(folder, f"{record.name}.json", record.model_dump(mode="json"))
    return record


def is_shipped(text: str) -> bool:
    """Return whether a text is the name of a shipped field, or can be nothing else: no path, and nothing lies there."""
    if text in names():
        return True
    location = None if "/" in text or "\0" in text or not text else open_location(text)
    return isinstance(location, LocalLocation) and not Path(location.uri).exists() and pair_of(text) is None


def check_channels(name: str, channels: int) -> None:
    """Raise StorageError where a shipped field does not know images of so many channels."""
    known = find(name).image_channels
    if channels != known:
        raise StorageError(
            f"field.pretrained={name}: knows images of {known} channels, these have {channels}: set "
            f"images.channels={known}, or choose another field (`functa fields`)"
        )


def check_pair(name: str) -> ReadyRecord:
    """Return the record of a shipped field with whole tensors. Raises UnknownField, DamagedObject."""
    record = find(name)
    read_tensors(open_location(FOLDER), name, record)
    return record
