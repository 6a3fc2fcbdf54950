"""Records: small JSON documents with the length and sha256 of objects. Each carries its own checksum."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from functa.storage.errors import DamagedObject, MissingObject
from functa.storage.places.address import MAX_JSON_BYTES, parse_json, readable
from functa.storage.places.location import Location

FORMAT: Literal[1] = 1  # of the functaset and of most records

NEWEST: Literal[2] = (
    2  # of any record: commits that name manifests, plans of many shards; a later one is refused, never guessed at
)

RecordType = TypeVar("RecordType", bound="Record")


class Record(BaseModel):
    """A frozen document; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)


class ObjectRecord(Record):
    """Length and sha256 of an object.

    Not its CRC-32C: zarr ends chunks and shards with theirs, and the CRC-32C of data that end in their own is the
    same for all data of that length, so that two swapped shards would pass.
    """

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


def vouch(data: bytes) -> ObjectRecord:
    """Return the record of these bytes."""
    return ObjectRecord(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def canonical(value: Any) -> bytes:
    """Return JSON bytes that depend on the value alone."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest(value: Any) -> str:
    """Return 24 hex digits of a JSON value's sha256."""
    return hashlib.sha256(canonical(value)).hexdigest()[:24]


def seal(record: Record) -> bytes:
    """Return the record's bytes, its own checksum inside."""
    body = record.model_dump(mode="json", by_alias=True)
    body["checksum"] = hashlib.sha256(canonical(body)).hexdigest()
    return json.dumps(body, sort_keys=True, indent=1).encode() + b"\n"


def create_record(location: Location, key: str, record: Record, fix: str) -> bool:
    """Create a record, sealed, as Location.create. Raises StorageError, naming the fix, if readers would refuse it."""
    return location.create(key, readable(seal(record), f"{location.uri}/{key}", fix))


def check_sealed(location: Location, key: str) -> None:
    """Check a record's own checksum. Raises MissingObject or DamagedObject."""
    _content(location.read(key, MAX_JSON_BYTES), f"{location.uri}/{key}")


def unseal(data: bytes, name: str, kind: type[RecordType]) -> RecordType:
    """Return the record in `data`. Raises DamagedObject naming it: not JSON, edited, of another shape or version."""
    content = _content(data, name)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise DamagedObject(f"{name}: {where}: {fault['msg']}; restore it from a copy") from None


def _content(data: bytes, name: str) -> dict[str, Any]:
    body = parse_json(data, name)
    if not isinstance(body, Mapping):
        raise DamagedObject(f"{name}: not a record; restore it from a copy")
    version = body.get("format", FORMAT)
    if version not in range(FORMAT, NEWEST + 1):
        raise DamagedObject(
            f"{name}: format {str(version)[:40]} is not one that this version reads ({FORMAT} to {NEWEST}); upgrade"
        )
    content = {key: value for key, value in body.items() if key != "checksum"}
    try:
        own = hashlib.sha256(canonical(content)).hexdigest()
    except (ValueError, RecursionError):  # numbers that are not finite, nested too deeply: never written here
        own = None
    if own is None or body.get("checksum") != own:
        raise DamagedObject(f"{name}: was altered (its checksum does not match); restore it from a copy")
    return content


def read_record(location: Location, key: str, kind: type[RecordType]) -> RecordType:
    """Read a record. Raises MissingObject or DamagedObject."""
    return unseal(location.read(key, MAX_JSON_BYTES), f"{location.uri}/{key}", kind)


def read_vouched(location: Location, key: str, record: ObjectRecord) -> bytes:
    """Read an object and check it against its record. Raises MissingObject or DamagedObject naming it."""
    name = f"{location.uri}/{key}"
    fix = "restore it from a copy, or encode its rows again: functa encode PRESET --repair"
    try:
        data = location.read(key, limit=record.bytes)  # one request; a huge file put in its place takes no memory
    except MissingObject:
        raise MissingObject(f"{name}: is missing; {fix}") from None
    except DamagedObject:
        raise DamagedObject(f"{name}: has {location.size(key)} bytes and should have {record.bytes}; {fix}") from None
    if len(data) != record.bytes:
        raise DamagedObject(f"{name}: has {len(data)} bytes and should have {record.bytes}; {fix}")
    if vouch(data) != record:
        raise DamagedObject(f"{name}: was altered (sha256 does not match); {fix}")
    return data
