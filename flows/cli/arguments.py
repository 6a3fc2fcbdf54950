"""Values of the command line that the command's own parser reads too kindly."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from cyclopts import Parameter


def whole(_type: Any, tokens: Sequence[Any]) -> int:
    """A whole number; 1.5 is refused, not rounded. Raises ValueError."""
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

Root = Annotated[str | None, Parameter(help="Where everything goes; default ./functa-runs/PRESET. A folder or s3://.")]

FromRoot = Annotated[
    str | None, Parameter(name="--from", help="Take finished stages from this root where digests agree.")
]

Split = Annotated[Literal["train", "test"], Parameter(help="Which of the two.")]

Functaset = Annotated[str, Parameter(help="A functaset's URI, or the root of the run that encoded it.")]

Json = Annotated[bool, Parameter(name="--json", help="One JSON document.", negative="")]


def functaset_of(uri: str) -> str:
    """A run's root stands for its functaset, wherever that lies: `--from` leaves it in the root that lent it."""
    from functa.storage.places.address import open_location
    from functa.storage.runs.stage_records import output_location, read_record

    location = open_location(uri)
    record = read_record(location, "encode")
    return uri if record is None else output_location(record, location).uri
