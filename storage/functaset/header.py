"""The header of a functaset: its fingerprint, which no later writer may change, and the field that decodes its latents.

    zarr.json                              group attributes {functaset: 1, fingerprint, fingerprint_digest, field}
    fields/<digest>.safetensors, .json     written before it

The fingerprint covers what a user chose that determines latents.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from functa.storage.errors import DamagedObject, MissingObject, StorageError
from functa.storage.functaset.records import FORMAT, ObjectRecord, Record, canonical, create_record, digest, vouch
from functa.storage.functaset.zarr_bytes import new_group
from functa.storage.places.address import read_json
from functa.storage.places.location import Location


class FieldRecord(Record):
    """The JSON beside a field's tensors."""

    config: dict[str, Any]
    digest: str
    tensors: ObjectRecord


FRAGMENTS = "fragments/zarr.json"  # of the group that holds them


@dataclass(frozen=True)
class Root:
    """The functaset's own attributes."""

    fingerprint: dict[str, Any]
    fingerprint_digest: str
    field: str


def read_root(location: Location) -> Root:
    """Return the functaset's attributes. Raises StorageError: no functaset there, of a later format, or altered."""
    name = f"{location.uri}/zarr.json"
    try:
        document = read_json(location, "zarr.json")
        attributes = document["attributes"]
        version = attributes["functaset"]
        if version != FORMAT:
            raise StorageError(f"{name}: functaset format {version!r}; this version reads {FORMAT}: upgrade it")
        root = Root(attributes["fingerprint"], attributes["fingerprint_digest"], _plain(attributes["field"]))
        whole = document["zarr_format"] == 3 and digest({**root.fingerprint}) == root.fingerprint_digest
    except MissingObject:
        raise MissingObject(
            f"{location.uri}: no functaset there (no zarr.json); name a functaset or the root of a run, or encode first"
        ) from None
    except (KeyError, TypeError, ValueError, RecursionError):
        raise DamagedObject(f"{name}: not a functaset's; choose another location") from None
    if not whole:
        raise DamagedObject(f"{name}: was altered (the fingerprint's digest does not match); restore it from a copy")
    return root


def check_fragments_group(location: Location) -> None:
    """Check the document by which plain zarr finds the fragments. Raises DamagedObject or MissingObject."""
    document = read_json(location, FRAGMENTS)
    if not isinstance(document, dict) or (document.get("zarr_format"), document.get("node_type")) != (3, "group"):
        raise DamagedObject(f"{location.uri}/{FRAGMENTS}: is not a zarr group's; encode --repair puts it back")


def put_fragments_group(location: Location) -> None:
    """Write that document, replacing whatever is there."""
    location.write(FRAGMENTS, new_group({}))


def create_functaset(
    location: Location,
    fingerprint: dict[str, Any],
    field: Mapping[str, np.ndarray],
    field_config: dict[str, Any],
    field_digest: str,
) -> None:
    """Create the functaset unless it exists. Raises StorageError naming the keys if it has another fingerprint."""
    fingerprint = json.loads(canonical(fingerprint))
    if location.exists("zarr.json"):
        location.create(FRAGMENTS, new_group({}))  # nobody needs it but plain zarr readers that walk down from the root
        _same_fingerprint(location, read_root(location), fingerprint)
        return
    from safetensors.numpy import save

    tensors = save({name: np.ascontiguousarray(value).reshape(np.shape(value)) for name, value in field.items()})
    stem = f"fields/{_plain(field_digest)}"
    described = FieldRecord(config=field_config, digest=field_digest, tensors=vouch(tensors))
    location.create(f"{stem}.safetensors", tensors)
    create_record(location, f"{stem}.json", described, "describe the field in less")
    location.create(FRAGMENTS, new_group({}))
    # The root last: a functaset without its field does not exist.
    attributes = {
        "functaset": FORMAT,
        "fingerprint": fingerprint,
        "fingerprint_digest": digest(fingerprint),
        "field": field_digest,
    }
    if not location.create("zarr.json", new_group(attributes)):
        _same_fingerprint(location, read_root(location), fingerprint)


def _same_fingerprint(location: Location, root: Root, fingerprint: dict[str, Any]) -> None:
    if root.fingerprint_digest == digest(fingerprint):
        return
    old, new = _flat(root.fingerprint), _flat(fingerprint)
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key, "absent") != new.get(key, "absent"))
    changes = ", ".join(f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}" for key in keys)
    raise StorageError(f"{location.uri}: holds latents of another fingerprint ({changes}); choose another location")


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}{key}.") if isinstance(inner, dict) else {f"{prefix}{key}": inner}
    return flat


def _plain(name: Any) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", name):
        raise ValueError(f"{name!r} is not a digest")
    return name
