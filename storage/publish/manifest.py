"""The manifest of an export: every file of it with length and sha256, its kind and its licence.

functa.json     written last: a folder without it is no export yet
README.md       cards; people edit them, so that the manifest names them and vouches for none of their bytes
"""

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError

from functa.storage.errors import DamagedObject, StorageError
from functa.storage.functaset.records import FORMAT, ObjectRecord, Record
from functa.storage.places.address import MAX_JSON_BYTES, parse_json, readable
from functa.storage.places.location import Location, checked_key

MANIFEST, CARD = "functa.json", "README.md"

Kind = Literal["root", "functaset", "photographs", "latents"]

Layout = Literal["parquet", "webdataset", "datasets"]  # formats of latents alone (formats/table.py)

LICENCE = r"^[A-Za-z0-9][A-Za-z0-9.+-]{0,63}$"


def _plain(path: str) -> str:
    try:
        return checked_key(path)
    except StorageError as error:
        raise ValueError(str(error)) from None


Path = Annotated[str, AfterValidator(_plain)]


class Manifest(Record):
    """The files of an export by their paths below its folder."""

    format: Literal[1] = FORMAT
    kind: Kind
    licence: str = Field(pattern=LICENCE)
    files: dict[Path, ObjectRecord]
    cards: tuple[Annotated[Path, Field(pattern=rf"(^|/){CARD}$")], ...] = ()

    @property
    def size(self) -> int:
        """Return the bytes of all files together."""
        return sum(record.bytes for record in self.files.values())

    def stored(self, name: str) -> bytes:
        """Return the document. Raises StorageError, naming it, for more files than a reader takes."""
        data = self.model_dump_json(indent=1).encode() + b"\n"
        return readable(data, name, "write fewer files: larger shards, or functa store compact")


def parse_manifest(data: bytes, name: str) -> Manifest:
    """Return the manifest in these bytes. Raises DamagedObject, naming it."""
    try:
        return Manifest.model_validate(parse_json(data, name))
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise DamagedObject(
            f"{name}: does not describe an export of this version ({where}: {fault['msg']}); export it again"
        ) from None


def read_manifest(location: Location) -> Manifest | None:
    """Return the manifest of an export, None where there is none. Raises DamagedObject."""
    if not location.exists(MANIFEST):
        return None
    return parse_manifest(location.read(MANIFEST, MAX_JSON_BYTES), f"{location.uri}/{MANIFEST}")


def taken(address: str, paths: Iterable[str], why: str, replaceable: bool = False) -> StorageError:
    """Return the error of a destination that holds something else than the export that is written there."""
    fix = "choose another name" + (", or put a new revision over that export with --replace" if replaceable else "")
    return StorageError(f"{address}: is taken: {min(paths)} there {why}; {fix}")
