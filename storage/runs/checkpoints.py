"""Checkpoints: safetensors for tensors, JSON for the rest, atomically written, the newest valid one loaded.

step-00001234.safetensors is written first (temporary name, fsync, rename), then the marker step-00001234.json with
its length and sha256. A checkpoint without a marker that matches does not exist.
"""

import hashlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field, ValidationError

from functa.storage.errors import DamagedObject, StorageError, TransientError
from functa.storage.functaset.records import Record
from functa.storage.places.address import read_json, write_json
from functa.storage.places.location import Location
from functa.storage.runs.weights import packed, read_description, unpacked

log = logging.getLogger(__name__)

MARKER = re.compile(r"step-(\d{8,12})\.json")

TENSORS = re.compile(r"step-(\d{8,12})\.safetensors")


def is_checkpoint(key: str) -> bool:
    """Return whether a file's name is one that this module writes."""
    return MARKER.fullmatch(key) is not None or TENSORS.fullmatch(key) is not None


class Marker(Record):
    """The length and sha256 of a checkpoint, and its metadata."""

    step: int = Field(ge=0)
    sha256: str
    bytes: int = Field(ge=0)
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint."""

    step: int
    tensors: dict[str, np.ndarray]
    metadata: dict[str, Any]


def save_checkpoint(
    location: Location, step: int, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any], keep: int = 2
) -> None:
    """Write a checkpoint, then delete all but the newest `keep` whole ones.

    A kill at any point leaves the previous checkpoint loadable. Raises StorageError.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"step {step} and keep {keep} must be at least 0 and 1")
    data = packed(tensors)
    marker = Marker(step=step, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data), metadata=dict(metadata))
    location.write(f"{_stem(step)}.safetensors", data)
    write_json(location, f"{_stem(step)}.json", marker.model_dump(mode="json"))
    _prune(location, keep)


def load_checkpoint(location: Location, step: int | None = None) -> Checkpoint | None:
    """Load the newest valid checkpoint (or the one of `step`); None if there is none.

    An invalid one is skipped with a warning; if requested by its step, it raises DamagedObject.
    """
    if step is not None:
        return _load(location, step) if location.exists(f"{_stem(step)}.json") else None
    for found in _steps(location, MARKER):
        try:
            return _load(location, found)
        except TransientError:
            raise  # else a lost connection would set training back to an older step
        except StorageError as error:
            log.warning("checkpoint skipped: %s", error)
    return None


def has_checkpoint(location: Location, step: int) -> bool:
    """Return whether a step's checkpoint is there, whole or not."""
    return location.exists(f"{_stem(step)}.json")


def newest_step(location: Location) -> int:
    """Return the step of the newest checkpoint of the right length, 0 where there is none. Reads no tensor."""
    return next((step for step in _steps(location, MARKER) if _is_whole(location, step)), 0)


def newest_metadata(location: Location) -> dict[str, Any] | None:
    """Return the metadata of the newest checkpoint of the right length, or None. Reads no tensor."""
    for step in _steps(location, MARKER):
        if _is_whole(location, step):
            return dict(_marker(location, step).metadata)
    return None


def trained_metadata(location: Location) -> dict[str, Any] | None:
    """Return the metadata of the newest checkpoint as newest_metadata does, else of weights that were kept alone.

    The end of a training leaves weights, and an export has nothing else of it.
    """
    found = newest_metadata(location)
    if found is not None:
        return found
    described = read_description(location)
    return None if described is None else described | {"finished": True}


def _stem(step: int) -> str:
    return f"step-{step:08d}"


def _steps(location: Location, pattern: re.Pattern[str]) -> list[int]:
    """Return the steps, newest first."""
    matches = (pattern.fullmatch(key) for key in location.list("step-"))
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def _marker(location: Location, step: int) -> Marker:
    key = f"{_stem(step)}.json"
    try:
        marker = Marker.model_validate(read_json(location, key))
    except ValidationError as error:
        raise DamagedObject(f"{location.uri}/{key}: not a checkpoint's marker ({error.errors()[0]['msg']})") from None
    if marker.step != step:
        raise DamagedObject(f"{location.uri}/{key}: is the marker of step {marker.step}; it was renamed")
    return marker


def _load(location: Location, step: int) -> Checkpoint:
    marker = _marker(location, step)
    name = f"{location.uri}/{_stem(step)}.safetensors"
    size = location.size(f"{_stem(step)}.safetensors")
    if size != marker.bytes:
        raise DamagedObject(f"{name}: has {size or 0} bytes and should have {marker.bytes}; delete this checkpoint")
    data = location.read(f"{_stem(step)}.safetensors")
    if hashlib.sha256(data).hexdigest() != marker.sha256:
        raise DamagedObject(f"{name}: was altered (sha256 does not match); delete this checkpoint")
    return Checkpoint(step, unpacked(data, name, "delete this checkpoint"), marker.metadata)


def _prune(location: Location, keep: int) -> None:
    """Delete what is older than the newest `keep` whole checkpoints, markers first: no marker without its tensors."""
    whole = [step for step in _steps(location, MARKER) if _is_whole(location, step)]
    if len(whole) < keep:
        return
    oldest = whole[keep - 1]
    for pattern, ending in ((MARKER, "json"), (TENSORS, "safetensors")):
        for step in _steps(location, pattern):
            if step < oldest:
                location.delete(f"{_stem(step)}.{ending}")


def _is_whole(location: Location, step: int) -> bool:
    """Return whether the length is right, which a crash can spoil; loading checks the sha256."""
    try:
        return location.size(f"{_stem(step)}.safetensors") == _marker(location, step).bytes
    except StorageError:
        return False
