"""Records: small JSON documents that vouch for objects. Each carries its own checksum."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from storage.errors import DamagedObject, MissingObject
from storage.locations import MAX_JSON_BYTES, Location, parse_json

FORMAT: Literal[1] = 1  # of the functaset; a later one is refused, never guessed at

RecordType = TypeVar("RecordType", bound="Record")


class Record(BaseModel):
    """A frozen document; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ObjectRecord(Record):
    """What an object must be: its length and sha256.

    Not its CRC-32C: zarr ends chunks and shards with theirs, and the CRC-32C of data that end in their own is the
    same for all data of that length, so that two swapped shards would pass.
    """

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


def vouch(data: bytes) -> ObjectRecord:
    """The record of these bytes."""
    return ObjectRecord(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def canonical(value: Any) -> bytes:
    """JSON bytes that depend on the value alone."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest(value: Any) -> str:
    """24 hex digits of a JSON value."""
    return hashlib.sha256(canonical(value)).hexdigest()[:24]


def seal(record: Record) -> bytes:
    """The record's bytes, its own checksum inside."""
    body = record.model_dump(mode="json")
    body["checksum"] = hashlib.sha256(canonical(body)).hexdigest()
    return json.dumps(body, sort_keys=True, indent=1).encode() + b"\n"


def unseal(data: bytes, name: str, kind: type[RecordType]) -> RecordType:
    """The record in `data`. Raises DamagedObject naming it: not JSON, edited, of another shape or version."""
    body = parse_json(data, name)
    if not isinstance(body, Mapping):
        raise DamagedObject(f"{name}: not a record; restore it from a copy")
    version = body.get("format", FORMAT)
    if version != FORMAT:
        raise DamagedObject(f"{name}: format {version!r} is not the one that this version reads ({FORMAT}); upgrade")
    content = {key: value for key, value in body.items() if key != "checksum"}
    if body.get("checksum") != hashlib.sha256(canonical(content)).hexdigest():
        raise DamagedObject(f"{name}: was altered (its checksum does not match); restore it from a copy")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise DamagedObject(f"{name}: {where}: {fault['msg']}; restore it from a copy") from None


def read_record(location: Location, key: str, kind: type[RecordType]) -> RecordType:
    """A standing record. Raises MissingObject or DamagedObject."""
    name = f"{location.uri}/{key}"
    size = location.size(key)
    if size is None:
        raise MissingObject(f"{name}: is missing")
    if size > MAX_JSON_BYTES:
        raise DamagedObject(f"{name}: {size} bytes are more than a record may have")
    return unseal(location.read(key), name, kind)


def read_vouched(location: Location, key: str, record: ObjectRecord) -> bytes:
    """The object's bytes, equal to what its record says. Raises MissingObject or DamagedObject naming it."""
    name = f"{location.uri}/{key}"
    mend = "restore it from a copy, or encode its rows again: functa encode PRESET --repair"
    size = location.size(key)
    if size is None:
        raise MissingObject(f"{name}: is missing; {mend}")
    if size != record.bytes:  # before reading: a huge file put in its place must not take memory
        raise DamagedObject(f"{name}: has {size} bytes and should have {record.bytes}; {mend}")
    data = location.read(key)
    if vouch(data) != record:
        raise DamagedObject(f"{name}: was altered (sha256 does not match); {mend}")
    return data
