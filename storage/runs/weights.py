"""Weights of a trained model: one safetensors file, and beside it a JSON file that describes them.

weights.json is written last and carries the length and sha256 of weights.safetensors: without it there are no weights.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field, ValidationError

from functa.storage.errors import DamagedObject
from functa.storage.functaset.records import Record
from functa.storage.places.address import read_json, write_json
from functa.storage.places.location import Location

TENSORS, SIDECAR = WEIGHTS = ("weights.safetensors", "weights.json")


class Sidecar(Record):
    """The length and sha256 of the weights, and their metadata."""

    sha256: str
    bytes: int = Field(ge=0)
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Weights:
    """Tensors by name, and all that is needed to use them."""

    tensors: dict[str, np.ndarray]
    metadata: dict[str, Any]


def write_weights(location: Location, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    """Replace the weights; a kill in between leaves no weights, never mixed ones. Raises StorageError."""
    data = packed(tensors)
    sidecar = Sidecar(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data), metadata=dict(metadata))
    if location.exists(SIDECAR):
        location.delete(SIDECAR)
    location.write(TENSORS, data)
    write_json(location, SIDECAR, sidecar.model_dump(mode="json"))


def read_description(location: Location) -> dict[str, Any] | None:
    """Return the metadata alone, or None if there are no weights. Raises DamagedObject."""
    sidecar = _sidecar(location)
    return None if sidecar is None else sidecar.metadata


def read_weights(location: Location) -> Weights | None:
    """Return the weights, or None if there are none. Raises DamagedObject if they were altered."""
    sidecar = _sidecar(location)
    if sidecar is None:
        return None
    name, fix = f"{location.uri}/{TENSORS}", "train again, or restore a copy"
    data = location.read(TENSORS)
    if len(data) != sidecar.bytes or hashlib.sha256(data).hexdigest() != sidecar.sha256:
        raise DamagedObject(f"{name}: was altered (length or sha256 does not match); {fix}")
    return Weights(unpacked(data, name, fix), sidecar.metadata)


def _sidecar(location: Location) -> Sidecar | None:
    if not location.exists(SIDECAR):
        return None
    try:
        return Sidecar.model_validate(read_json(location, SIDECAR))
    except ValidationError as error:
        fault = error.errors()[0]["msg"]
        raise DamagedObject(f"{location.uri}/{SIDECAR}: does not describe weights ({fault})") from None


def packed(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Return the bytes of a safetensors file."""
    from safetensors.numpy import save

    # safetensors stores a non-contiguous array's memory in the wrong order, without an error.
    return save({name: np.ascontiguousarray(value).reshape(np.shape(value)) for name, value in tensors.items()})


def unpacked(data: bytes, name: str, fix: str) -> dict[str, np.ndarray]:
    """Return the tensors of a safetensors file. Raises DamagedObject, naming the file and the fix."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return dict(load(data))
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DamagedObject(f"{name}: not a safetensors file ({error}); {fix}") from None
