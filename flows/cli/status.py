"""`functa status`: the state of each stage of a root, from records and receipts alone."""

from typing import Any

from rich.table import Table
from rich.text import Text

from functa.flows.server.console import text_console
from functa.storage.errors import DamagedObject, MissingObject, StorageError, TransientError
from functa.storage.places.address import open_location
from functa.storage.places.location import Location
from functa.storage.runs.stage_records import StageRecord, output_exists, output_location, read_record, was_killed
from functa.tasks.stage_table import STAGES


def read_status(root: str) -> dict[str, Any]:
    """Return {stages{name: state}, images, shards{done, left, bad}, images_per_s, damage[], errors{}}.

    Reads records and receipts alone. A state is that of the stage's record, or "not started", "missing" (there is no
    output), "damaged" (`damage` has a line about it) or "interrupted" (its process on this machine was killed).
    `errors` holds by stage what ended its last attempt; earlier output remains valid. `images` counts encoded rows.
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
            continue  # the run's config has no such stage
        garbled = any(f"/stages/{stage}.json" in line for line in damage)
        states[stage] = "damaged" if garbled else "not started" if record is None else _state(record, location, damage)
    shards: dict[str, Any] = {"done": 0, "left": 0, "bad": 0}
    errors = {stage: record.error for stage, record in records.items() if record is not None and record.error}
    found: dict[str, Any] = {"stages": states, "images": 0, "shards": shards, "images_per_s": None}
    found |= {"damage": damage, "errors": errors}
    encoded = records["encode"]
    if encoded is not None and states["encode"] != "missing":
        from functa.storage.upkeep.status import status

        counted = status(output_location(encoded, location), ended=encoded.state == "finished")
        shards |= {k: counted[k] for k in shards}
        found["images"] = counted["rows"]
        if counted["seconds"]:
            found["images_per_s"] = round(counted["rows"] / counted["seconds"], 2)
        if counted["damage"]:
            states["encode"] = "damaged"
            damage += [line for line in counted["damage"] if line not in damage]
    return found


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
        return "interrupted" if was_killed(record) else record.state
    try:
        return "finished" if output_exists(record, location) else "missing"
    except (DamagedObject, MissingObject) as error:
        damage.append(str(error))
        return "damaged"


def _planned(records: dict[str, StageRecord | None]) -> tuple[str, ...]:
    """Return the stages of the run that was started last in the root."""
    begun = [record for record in records.values() if record is not None and record.stages]
    return max(begun, key=lambda record: record.started).stages if begun else tuple(STAGES)


def print_status(root: str, found: dict[str, Any]) -> None:
    """Print a table of stages, a line about encoding, and errors and damage, all exactly as they are."""
    console = text_console(soft_wrap=True)
    table = Table("stage", "state", title=Text(root), title_justify="left")
    for stage, state in found["stages"].items():
        table.add_row(STAGES[stage].command, state)
    console.print(table)
    shards = found["shards"]
    left = f"; {shards['done']} of {shards['done'] + shards['left']} shards" if shards["left"] else ""
    speed = "" if found["images_per_s"] is None else f"; {found['images_per_s']:.0f} images/s"
    console.print(f"Encoded: {found['images']:,} images{left}; {shards['bad']} bad images{speed}")
    for stage, line in found["errors"].items():
        console.print(f"{STAGES[stage].command}, last attempt: {line}")
    for line in found["damage"]:
        console.print(f"Damaged: {line}")
