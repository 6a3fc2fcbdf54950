"""Arguments that several commands share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter

# Headings of `functa --help`, in this order.
RUN, USE, LOOK, OPERATE = (
    Group.create_ordered(name) for name in ("Run", "Use a finished run", "Look", "Operate a server")
)


def whole(_type: Any, tokens: Sequence[Any]) -> int:
    """Read a whole number. Raises ValueError for 1.5, which cyclopts would round."""
    text = tokens[0].value
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"'{text}' is not a whole number") from None


Preset = Annotated[str, Parameter(help="A preset's name (see `functa presets`) or a YAML file.")]

Overrides = Annotated[
    list[str] | None,
    Parameter(
        name="--set", help="KEY=VALUE, such as field.width=256; repeatable.", negative="", consume_multiple=False
    ),
]

Root = Annotated[str | None, Parameter(help="Folder or s3:// of the run; default: ./functa-runs/PRESET.")]

FromRoot = Annotated[
    str | None, Parameter(name="--from", help="Reuse finished stages of this root where digests agree.")
]

Deployment = Annotated[bool, Parameter(help="Run on the workers of a running server.", negative="")]

Split = Annotated[Literal["train", "test"], Parameter(help="Which of the two splits.")]

Functaset = Annotated[str, Parameter(help="A functaset's URI, or the root of the run that encoded it.")]


def path_of(_type: Any, tokens: Sequence[Any]) -> Path:
    """Read a path; ~ is expanded, which the shell leaves to the command in --out=~/folder."""
    return Path(tokens[0].value).expanduser()


OutFolder = Annotated[Path, Parameter(converter=path_of, help="Folder for the PNG files.")]

Json = Annotated[bool, Parameter(name="--json", help="One JSON document.", negative="")]


def functaset_of(uri: str) -> str:
    """Return the URI of a run's functaset, which --from may have left in another root; other URIs as they are."""
    from functa.storage.places.address import open_location
    from functa.storage.runs.stage_records import output_location, read_record
    from functa.tasks.inference.photographs.store import only_functaset

    location = open_location(uri)
    record = read_record(location, "encode")
    return only_functaset(uri) if record is None else output_location(record, location).uri


def own_functaset_of(uri: str) -> str:
    """Return the URI of a functaset to change. Raises StorageError for a root that only reads another root's."""
    from functa.storage.errors import StorageError
    from functa.storage.places.address import open_location
    from functa.storage.places.reused import refuse_link_out
    from functa.storage.runs.stage_records import is_reused, read_record

    location = open_location(uri)
    record = read_record(location, "encode")
    if record is None:
        return uri
    if is_reused(record):
        raise StorageError(f"{uri}: its functaset is in {record.output}, which it only reads; name that to change it")
    refuse_link_out(location, record.output)
    return functaset_of(uri)
