"""Stage records: what a root holds, made from what, under which config. Readable without torch or zarr."""

import json
import socket
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from functa.storage.errors import DamagedObject, MissingObject, StorageError
from functa.storage.functaset.header import read_root
from functa.storage.functaset.history import RESTORE, commit_key, versions
from functa.storage.functaset.records import check_sealed
from functa.storage.places.address import MAX_STAGE_BYTES, is_address, readable
from functa.storage.places.location import Location
from functa.storage.places.reused import output_of
from functa.storage.runs.checkpoints import trained_metadata
from functa.storage.runs.owner import host_of, lives_here, this_process


class StageRecord(BaseModel):
    """One stage of one root, written when it starts and again when it has ended."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    state: Literal["running", "interrupted", "failed", "finished"]
    config: dict[str, Any]  # the keys that decide the result, flat
    pipeline: dict[str, Any] = {}  # the whole config of the run, so that a schedule can do the stage again
    stages: tuple[str, ...] = ()  # all stages of the run that this one is part of; empty in records of older versions
    inputs: dict[str, str]  # digests of what it reads
    output: str  # under the root, or the URI of another root's output that was taken over
    output_digest: str = ""
    figures: dict[str, Any] = {}
    seconds: float = 0.0
    started: str
    finished: str = ""
    error: str = ""
    by_config: bool = False  # failed through its config alone (a diverged loss): another one replaces it
    owner: str = ""  # host/pid/start of the process at work
    device: str = ""  # CUDA_VISIBLE_DEVICES of that process
    flow_run: str = ""  # its id at the Prefect server
    versions: dict[str, str] = {}


class StageConflict(StorageError):
    """A root holds this stage's output of another config."""


def read_record(root: Location, stage: str) -> StageRecord | None:
    """Return the stage's record, or None. Raises StorageError if it is garbled."""
    key = f"stages/{stage}.json"
    if not root.exists(key):
        return None
    try:
        return StageRecord.model_validate(json.loads(root.read(key, MAX_STAGE_BYTES)))
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise StorageError(
            f"{root.uri}/{key}: not a stage record ({reason}); delete it to run the stage again"
        ) from None


def write_record(root: Location, record: StageRecord) -> None:
    """Replace the stage's record atomically."""
    key, data = f"stages/{record.stage}.json", record.model_dump_json(indent=1).encode()
    root.write(key, readable(data, f"{root.uri}/{key}", "lower images.max_bad_fraction", MAX_STAGE_BYTES))


def check_same_config(root: Location, record: StageRecord, config: dict[str, Any], strictly: bool = False) -> None:
    """Raise StageConflict, naming the changed keys as `key: old -> new`, if existing output is of another config.

    Training that failed through its config is no conflict: its message asks to change a key. Training that a full disk
    or a killed process ended is one: its checkpoints are good. A failed encoding is none: another goes beside it.
    strictly: all of them are conflicts.
    """
    keys = sorted(k for k in record.config.keys() | config.keys() if record.config.get(k) != config.get(k))
    makes_way = record.state == "failed" and (record.by_config or record.stage == "encode")
    if not keys or (not strictly and (makes_way or not _any_output(record, root))):
        return
    changes = ", ".join(f"{k}: {record.config.get(k)!r} -> {config.get(k)!r}" for k in keys[:6])
    more = f" and {len(keys) - 6} more" if len(keys) > 6 else ""
    fix = f"choose another --root, with --from {root.uri} to take over what still fits"
    if keys == ["images.split"] and "images.split" not in record.config:  # its version knew one way only
        fix = f"--set images.split=stratified continues it; or {fix}"
    raise StageConflict(f"{root.uri} holds a {record.stage} of another config ({changes}{more}): {fix}")


def output_location(record: StageRecord, root: Location) -> Location:
    """Return the location of the stage's output. Raises StorageError for another root's that was never let in."""
    return output_of(root, record.output)


def is_reused(record: StageRecord) -> bool:
    """Return whether the output is another root's."""
    return is_address(record.output)


def output_exists(record: StageRecord, root: Location) -> bool:
    """Return whether the record's output exists, is complete, and is the one that was recorded.

    A functaset's shards and a checkpoint's tensors are checked when they are read. Raises DamagedObject if the
    functaset's newest commit or its root document is damaged: another encoding would not repair it.
    """
    output = output_location(record, root)
    if record.stage == "evaluate":
        return root.exists("metrics.json") and root.exists("report.html") and output.exists("run.json")
    if record.stage == "encode":
        return _is_committed(output, int(record.figures.get("info", {}).get("version", 0)))
    metadata = trained_metadata(output)
    return (
        metadata is not None
        and bool(metadata.get("finished"))
        and metadata.get("weights_digest") == record.output_digest
    )


def _is_committed(functaset: Location, recorded: int) -> bool:
    """Return whether anything is committed; `recorded` is a version that there was."""
    found = versions(functaset)
    newest = max([recorded, *found]) if found or functaset.exists("zarr.json") else 0
    if not newest:
        return False
    try:
        check_sealed(functaset, commit_key(newest))
    except MissingObject:
        raise DamagedObject(f"{functaset.uri}/{commit_key(newest)}: is missing; {RESTORE}") from None
    read_root(functaset)
    return True


def check_not_at_work(root: Location, record: StageRecord) -> None:
    """Raise StorageError if another process of this machine works on the stage: two would spoil each other's files.

    About processes of other machines flows/server/at_work.py asks the server.
    """
    if record.state == "running" and record.owner != this_process() and lives_here(record.owner):
        pid = record.owner.split("/")[1]
        raise StorageError(
            f"{root.uri}: process {pid} is at {record.stage.replace('_', '-')} there since {record.started}; "
            f"wait for it, stop it, or choose another --root"
        )


def was_killed(record: StageRecord) -> bool:
    """Return whether the record names a process of this machine at work that no longer runs: it was killed."""
    here = host_of(record.owner) == socket.gethostname()
    return record.state == "running" and here and not lives_here(record.owner)


def is_elsewhere(record: StageRecord) -> bool:
    """Return whether the record names a process of another machine (or one that had another name) at work."""
    away = host_of(record.owner) != socket.gethostname()
    return record.state == "running" and away and not lives_here(record.owner)


def _any_output(record: StageRecord, root: Location) -> bool:
    """Return whether any output exists, finished or not, that another config would spoil."""
    output = output_location(record, root)
    if record.stage == "evaluate":
        return record.state == "finished" and output.exists("run.json")
    if record.stage == "encode":
        return output.exists("zarr.json")
    return trained_metadata(output) is not None
