"""`functa status`: the state of each stage of a root, from records and receipts alone."""

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from functa.flows.config.digests import STAGES
from functa.storage.errors import DamagedObject, MissingObject, StorageError, TransientError
from functa.storage.places.address import open_location
from functa.storage.places.location import Location
from functa.storage.runs.stage_records import StageRecord, ended_unsaid, output_location, output_stands, read_record

if TYPE_CHECKING:
    pass


def read_status(root: str) -> dict[str, Any]:
    """{stages{name: state}, shards{done, left, bad}, images_per_s, damage[], errors{}}, of records and receipts alone.

    `errors` is what ended a stage's last try, by stage; one that stood before that still stands.
    A state is one of a record, or "not started", "missing" (its output is gone) or "damaged" (a line of `damage` says
    what). Who was killed cannot say so: of a process of this machine that is gone the state is "interrupted".
    """
    location = open_location(root)
    damage: list[str] = []
    records = {stage: _readable(location, stage, damage) for stage in STAGES}
    if not any(records.values()) and not damage:
        raise StorageError(f"{root}: no run has been started there; `functa run PRESET --root {root}` starts one")
    states = {}
    planned = _planned(records)
    for stage, record in records.items():
        if record is None and stage not in planned:
            continue  # the run's config has no such stage: nothing is missing
        garbled = any(f"/stages/{stage}.json" in line for line in damage)
        states[stage] = "damaged" if garbled else "not started" if record is None else _state(record, location, damage)
    shards: dict[str, Any] = {"done": 0, "left": 0, "bad": 0}
    errors = {stage: record.error for stage, record in records.items() if record is not None and record.error}
    told: dict[str, Any] = {"stages": states, "shards": shards, "images_per_s": None, "damage": damage}
    told["errors"] = errors
    encoded = records["encode"]
    if encoded is not None and states["encode"] != "missing":
        from functa.storage.upkeep.status import status

        counted = status(output_location(encoded, location), ended=encoded.state == "finished")
        shards |= {k: counted[k] for k in shards}
        if counted["seconds"]:
            told["images_per_s"] = round(counted["rows"] / counted["seconds"], 2)
        if counted["damage"]:
            states["encode"] = "damaged"
            damage += [line for line in counted["damage"] if line not in damage]
    return told


def _readable(location: Location, stage: str, damage: list[str]) -> StageRecord | None:
    try:
        return read_record(location, stage)
    except TransientError:
        raise
    except StorageError as error:
        damage.append(str(error))
        return None


def _state(record: StageRecord, location: Location, damage: list[str]) -> str:
    if record.state != "finished":
        return "interrupted" if ended_unsaid(record) else record.state
    try:
        return "finished" if output_stands(record, location) else "missing"
    except (DamagedObject, MissingObject) as error:
        damage.append(str(error))
        return "damaged"


def _planned(records: dict[str, StageRecord | None]) -> tuple[str, ...]:
    """The stages of the run that was begun last in the root."""
    begun = [record for record in records.values() if record is not None and record.stages]
    return max(begun, key=lambda record: record.started).stages if begun else STAGES


def print_status(root: str, told: dict[str, Any]) -> None:
    """A table of stages, and a line of shards."""
    console = Console()
    table = Table("stage", "state", title=root, title_justify="left")
    for stage, state in told["stages"].items():
        table.add_row(stage, state)
    console.print(table)
    shards = told["shards"]
    speed = "" if told["images_per_s"] is None else f"; {told['images_per_s']:.0f} images/s while encoding"
    console.print(f"Shards: {shards['done']} done, {shards['left']} left; {shards['bad']} bad inputs{speed}")
    for stage, line in told["errors"].items():
        console.print(f"{stage}, last try: {line}", soft_wrap=True, highlight=False, markup=False)
    for line in told["damage"]:
        console.print(f"Damaged: {line}", soft_wrap=True, highlight=False, markup=False)
