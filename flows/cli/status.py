"""`functa status`: the state of each stage of a root, from records and receipts alone."""

from contextlib import suppress
from typing import Any

from rich.table import Table
from rich.text import Text

from functa.flows.server.console import text_console
from functa.storage.errors import DamagedObject, MissingObject, StorageError, TransientError, printable
from functa.storage.places.address import open_location
from functa.storage.places.location import Location
from functa.storage.places.reused import NotReused
from functa.storage.runs.checkpoints import newest_step
from functa.storage.runs.stage_records import StageRecord, output_exists, output_location, read_record, was_killed
from functa.tasks.dispatch.progress import count, images_per_second
from functa.tasks.stage_table import STAGES


def read_status(root: str) -> dict[str, Any]:
    """Return the state of each stage and what a reader of it needs next, from records and receipts alone.

    stages{name: state}: the state of the stage's record, or "not started", "missing" (there is no output), "damaged"
        (`damage` has a line about it) or "interrupted" (its process on this machine was killed)
    steps{name: [done, all]}: of a training that has not finished, at its last checkpoint
    images, shards{done, left, bad}: `images` counts what the functaset shows
    images_per_s: of a finished encoding, as in metrics.json; else of the computing alone
    damage[], errors{name: what ended its last attempt}: earlier output remains valid
    report: its URI, or None; outdated[]: the inputs of which the report is of an earlier version
    command: what continues the run or updates its report; "" while it runs, where nothing is left to do or unknown
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
    found: dict[str, Any] = {"stages": states, "steps": {}, "images": 0, "shards": shards, "images_per_s": None}
    found |= {"damage": damage, "errors": errors}
    encoded = records["encode"]
    if encoded is not None and states["encode"] != "missing":
        found |= _encoded(encoded, location, states, damage)
    known = {stage: record for stage, record in records.items() if record is not None and stage in states}
    found["steps"] = {stage: _steps(record, location) for stage, record in known.items() if _trains(stage, states)}
    found["report"] = f"{location.uri}/report.html" if location.exists("report.html") else None
    found["outdated"] = _outdated(known) if states.get("evaluate") == "finished" else []
    found["command"] = _next_command(known, states, location, found["outdated"])
    return found


def _encoded(record: StageRecord, location: Location, states: dict[str, str], damage: list[str]) -> dict[str, Any]:
    """Return {images, shards, images_per_s} of a functaset, and note its damage."""
    from functa.storage.upkeep.status import status

    counted = status(output_location(record, location), ended=record.state == "finished")
    if counted["damage"]:
        states["encode"] = "damaged"
        damage += [line for line in counted["damage"] if line not in damage]
    speed = record.figures.get("encode_images_per_s") if record.state == "finished" else None
    if speed is None and counted["seconds"]:
        speed = round(counted["rows"] / counted["seconds"], 2)
    shards = {key: counted[key] for key in ("done", "left", "bad")}
    return {"images": counted["images"], "shards": shards, "images_per_s": speed}


def _trains(stage: str, states: dict[str, str]) -> bool:
    return STAGES[stage].trains and states[stage] in ("running", "interrupted", "failed")


def _steps(record: StageRecord, location: Location) -> list[int]:
    """Return the step of a training's last checkpoint, and of how many."""
    return [
        newest_step(output_location(record, location)),
        record.config.get(f"{STAGES[record.stage].sections[-1]}.steps", 0),
    ]


def _outdated(records: dict[str, StageRecord]) -> list[str]:
    """Return what the report was made from that has another digest now."""
    made_from = records["evaluate"].inputs
    return [
        STAGES[stage].product
        for stage, record in records.items()
        if stage in made_from and record.output_digest and record.output_digest != made_from[stage]
    ]


def _next_command(
    records: dict[str, StageRecord], states: dict[str, str], location: Location, outdated: list[str]
) -> str:
    """Return the command that does what is left to do; "" where it is not known or nothing is left."""
    begun = [record for record in records.values() if record.pipeline]
    if not begun or "running" in states.values() or (set(states.values()) == {"finished"} and not outdated):
        return ""
    from functa.flows.config.command import command_line
    from functa.flows.config.load import recorded_config

    with suppress(ValueError, StorageError):  # a config of another version
        config = recorded_config(max(begun, key=lambda record: record.started))
        command = command_line(config, location.uri)
        return command.replace("functa run", "functa evaluate", 1) if set(states.values()) == {"finished"} else command
    return ""


def _readable(location: Location, stage: str, damage: list[str]) -> StageRecord | None:
    try:
        record = read_record(location, stage)
        if record is not None:
            output_location(record, location)
        return record
    except TransientError:
        raise
    except NotReused as error:
        damage.append(f"{location.uri}/stages/{stage}.json: {error}")
        return None
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
    """Print a table of stages, lines about encoding and report, the next command, errors and damage as they are."""
    console = text_console(soft_wrap=True)
    table = Table("stage", "state", title=Text(printable(root)), title_justify="left")
    for stage, state in found["stages"].items():
        done, steps = found["steps"].get(stage, (0, 0))
        reached = (
            f", last checkpoint at step {done:,} of {steps:,}" if done else f", of {steps:,} steps" if steps else ""
        )
        table.add_row(STAGES[stage].command, state + reached)
    console.print(table)
    console.print(_encoding_line(found))
    if found["report"]:
        console.print(f"Report: {found['report']}")
    if found["outdated"]:
        console.print(f"The report is of an earlier version of: {', '.join(found['outdated'])}.")
    for stage, line in found["errors"].items():
        console.print(f"{STAGES[stage].command}, last attempt: {line}")
    for line in found["damage"]:
        console.print(f"Damaged: {line}")
    if found["command"]:
        console.print(f"Next: {found['command']}")


def _encoding_line(found: dict[str, Any]) -> str:
    shards, rate = found["shards"], found["images_per_s"]
    parts = [count(found["images"], "image")]
    parts += [f"{shards['done']} of {shards['done'] + shards['left']} shards"] if shards["left"] else []
    parts.append(count(shards["bad"], "bad image"))
    if rate is not None:
        alone = "" if found["stages"].get("encode") == "finished" else " of computing alone"
        parts.append(images_per_second(rate) + alone)
    return f"Encoded: {'; '.join(parts)}"
