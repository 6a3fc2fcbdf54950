"""Stage records: what a root holds, made from what, under which config. Readable without torch or zarr."""

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from storage.checkpoints import newest_step
from storage.errors import StorageError
from storage.locations import Location, open_location

# Where a stage's output lies under the root.
OUTPUTS = {
    "meta_train": "checkpoints/field",
    "encode": "functaset.zarr",
    "train_classifier": "checkpoints/classifier",
    "train_diffusion": "checkpoints/diffusion",
    "evaluate": "runs",
}


class StageRecord(BaseModel):
    """One stage of one root, written when it starts and again when it has finished."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    state: Literal["running", "finished"]
    config: dict[str, Any]  # the keys that decide the result, flat
    inputs: dict[str, str]  # digests of what it reads
    output: str  # under the root, or the URI of another root's output that was taken over
    output_digest: str = ""
    figures: dict[str, Any] = {}
    seconds: float = 0.0
    started: str
    finished: str = ""
    versions: dict[str, str] = {}


class StageConflict(StorageError):
    """A root holds this stage's output of another config."""


def read_record(root: Location, stage: str) -> StageRecord | None:
    """The stage's record, or None. Raises StorageError if it is garbled."""
    key = f"stages/{stage}.json"
    if not root.exists(key):
        return None
    try:
        return StageRecord.model_validate(json.loads(root.read(key)))
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise StorageError(
            f"{root.uri}/{key}: not a stage record ({reason}); delete it to run the stage again"
        ) from None


def write_record(root: Location, record: StageRecord) -> None:
    """Replaces the stage's record atomically."""
    root.write(f"stages/{record.stage}.json", record.model_dump_json(indent=1).encode())


def check_same_config(root: Location, record: StageRecord, config: dict[str, Any]) -> None:
    """Raises StageConflict, naming the changed keys as `key: old -> new`, if the record is of another config."""
    keys = sorted(k for k in record.config.keys() | config.keys() if record.config.get(k) != config.get(k))
    if keys:
        changes = ", ".join(f"{k}: {record.config.get(k)!r} -> {config.get(k)!r}" for k in keys[:6])
        more = f" and {len(keys) - 6} more" if len(keys) > 6 else ""
        raise StageConflict(
            f"{root.uri} holds a {record.stage} of another config ({changes}{more}): "
            f"choose another --root, with --from {root.uri} to take over what still fits"
        )


def output_location(record: StageRecord, root: Location) -> Location:
    """Where the stage's output is."""
    borrowed = "://" in record.output or record.output.startswith("/")
    return open_location(record.output) if borrowed else root.child(*record.output.split("/"))


def output_stands(record: StageRecord, root: Location) -> bool:
    """Whether what the record tells of is (still) there. Presence only: readers check the bytes."""
    if record.stage == "evaluate":
        return root.exists("metrics.json") and root.exists("report.html")
    output = output_location(record, root)
    if record.stage == "encode":
        return any(key.endswith(".json") for key in output.list("commits"))
    return newest_step(output) is not None
