"""Decide which stages of a run are up to date, from stage records and digests. Imports neither torch nor Prefect."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from typing import Any

from functa.flows.config.digests import (
    before_quantization,
    digest,
    digest_of_columns,
    inputs_of,
    stage_config,
    stages_of,
)
from functa.flows.config.load import with_absolute_images
from functa.flows.config.schema import PipelineConfig
from functa.flows.server.at_work import check_nobody_at_work, current_flow_run
from functa.storage.errors import FunctaError, StorageError
from functa.storage.functaset.header import read_root
from functa.storage.images.source import Images, open_images
from functa.storage.places.address import open_location
from functa.storage.places.location import Location
from functa.storage.places.reused import allow_reuse, refuse_link_out
from functa.storage.runs.checkpoints import trained_metadata
from functa.storage.runs.owner import this_process
from functa.storage.runs.stage_records import (
    StageRecord,
    check_same_config,
    is_reused,
    output_exists,
    output_location,
    read_record,
    write_record,
)
from functa.tasks.dispatch.child import TrainingFailed
from functa.tasks.stage_table import STAGES

PACKAGES = ("torch", "prefect", "zarr", "diffusers", "timm", "numpy")


@dataclass
class Ledger:
    """The stages of one config in one root."""

    config: PipelineConfig
    root: str
    from_root: str | None = None
    location: Location = field(init=False)
    _begun: float = field(init=False, default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.location = open_location(self.root)
        self.config = with_absolute_images(self.config)
        if self.from_root is not None and not open_location(self.from_root).list("stages/"):
            raise MissingInput(f"--from {self.from_root}: no run has been started there; name the root of one")

    def up_to_date(self, stage: str) -> StageRecord | None:
        """Return the finished record of the stage if it need not run again, from this root or the one reused from.

        None too for a stage that the config does not have. Raises StageConflict if this root holds the stage's output
        made with another config.
        """
        if stage not in stages_of(self.config):
            return None
        record = read_record(self.location, stage)
        if record is not None:
            if is_reused(record) and self.from_root is not None:
                allow_reuse(self.location, record.output, of=open_location(self.from_root))
            check_same_config(self.location, record, self._wanted(stage, record, self.location))
            if self._fits(record, self.location):
                return self._refreshed(record) if is_reused(record) and stage == "encode" else record
        return self._reused(stage)

    def _wanted(self, stage: str, record: StageRecord | None, root: Location) -> dict[str, Any]:
        """Return the config that the record should have; a moved folder of the same images is no other config."""
        wanted, key = stage_config(self.config, stage), "images.location"
        recorded = None if record is None else record.config.get(key)
        if recorded and recorded != wanted.get(key) and self._holds_the_same_images(str(recorded), root):
            return wanted | {key: recorded}
        return wanted

    def _holds_the_same_images(self, recorded: str, root: Location) -> bool:
        """Return whether the config's location is the recorded one, in other words, or moved since.

        Raises TransientError where the images cannot be listed now.
        """
        relative = "://" not in recorded and not os.path.isabs(os.path.expanduser(recorded))
        if not relative and open_location(recorded).uri == self.config.images.location:
            return True
        encoded = read_record(root, "encode")
        if encoded is not None and encoded.config.get("images.location") == recorded:
            digest_then = encoded.figures.get("images_digest")
            if digest_then and digest_then == self._images_digest:
                if root.uri == self.location.uri:
                    self._record_move(recorded)
                return True
        # Older versions recorded it as it was typed, in a folder that is not known any more.
        typed = os.path.normpath(recorded).lstrip("./")
        return relative and self.config.images.location.endswith(f"/{typed}")

    def _record_move(self, recorded: str) -> None:
        """Replace a location in all records of this root: later the images may differ from those that were moved."""
        for stage in STAGES:
            record = read_record(self.location, stage)
            if record is not None and record.state != "running" and record.config.get("images.location") == recorded:
                moved = record.config | {"images.location": self.config.images.location}
                write_record(self.location, record.model_copy(update={"config": moved}))

    def _refreshed(self, record: StageRecord) -> StageRecord:
        """Return the record of a reused functaset as its own root has it now: newer commits may have come."""
        other = open_location(record.output.rpartition("/")[0])
        now = read_record(other, record.stage)
        if now is None or is_reused(now) or not now.output_digest or now.output_digest == record.output_digest:
            return record
        same = _same_work(now, record) and output_location(now, other).uri == record.output
        return self._take(now, record.output) if same else record

    def current(self, stage: str, must_ask: bool = False) -> StageRecord | None:
        """Return the record if the stage is up to date, and no image was added, removed or changed since its encoding.

        Images that cannot be listed are taken as unchanged, or must_ask raises StorageError. The images of a reused
        functaset are not checked: its own root does that.
        """
        record = self.up_to_date(stage)
        if stage != "encode" or record is None or is_reused(record):
            return record
        try:
            now = self._images_digest
        except StorageError:
            if must_ask:
                raise
            return record
        return record if record.figures.get("images_digest", now) == now else None

    @cached_property
    def _images_digest(self) -> str:
        return images_digest(open_images(self.config.images))

    def _fits(self, record: StageRecord, location: Location) -> bool:
        # While images are added to a functaset, what it held before can be read.
        readable = record.state == "finished" or (record.state == "running" and bool(record.output_digest))
        return readable and record.inputs == self.inputs(record.stage) and output_exists(record, location)

    def _reused(self, stage: str) -> StageRecord | None:
        if self.from_root is None or stage == "evaluate":  # a report belongs to its root
            return None
        other = open_location(self.from_root)
        record = read_record(other, stage)
        if record is None or record.config != self._wanted(stage, record, other) or not self._fits(record, other):
            return None
        return self._take(record, output_location(record, other).uri)

    def _take(self, record: StageRecord, output: str) -> StageRecord:
        """Write a record of another root's output into this root: the output's URI, and this root's config."""
        update: dict[str, Any] = {"output": output, "stages": stages_of(self.config), "state": "finished", "owner": ""}
        update["pipeline"] = self.config.model_dump(mode="json")  # its sampling may differ
        taken = record.model_copy(update=update)
        allow_reuse(self.location, output)
        write_record(self.location, taken)
        return taken

    def inputs(self, stage: str) -> dict[str, str]:
        """Return the digests of the stage's inputs, of those that are up to date.

        A model is trained on one commit of a functaset; later commits with the same choices and classes do not make it
        out of date.
        """
        records = {name: self.up_to_date(name) for name in inputs_of(self.config, stage)}
        return {
            name: record.figures.get("choices", record.output_digest) if STAGES[stage].trains else record.output_digest
            for name, record in records.items()
            if record is not None
        }

    def float_latents(self) -> str:
        """Return the URI of a functaset in the root reused from that has this encoding's latents at 32 bits, or "".

        It is of the same images, as they are now, and of the same field: only the quantiser differs.
        """
        if self.from_root is None or self.config.encode.quantization.bits == 32:
            return ""
        other = open_location(self.from_root)
        record = read_record(other, "encode")
        if record is None or record.config.get("encode.quantization.bits") != 32 or not self._fits(record, other):
            return ""
        same = before_quantization(record.config) == before_quantization(self._wanted("encode", record, other))
        if not same or record.figures.get("images_digest") != self._images_digest:
            return ""
        return output_location(record, other).uri

    def newer_commit_note(self, record: StageRecord) -> str:
        """Return a remark for a model that was trained on an older commit than the functaset's newest, else ""."""
        encoded = read_record(self.location, "encode") if STAGES[record.stage].trains else None
        newest = encoded.figures.get("info", {}).get("version") if encoded is not None else None
        commit = record.figures.get("commit", newest)
        if commit == newest:
            return ""
        model = self.output(record)
        return f" (trained on commit {commit} of the functaset, which has {newest}; delete {model} to train anew)"

    def require(self, stage: str) -> StageRecord:
        """Return the finished record of an input stage. Raises MissingInput if it has not run."""
        record = self.up_to_date(stage)
        if record is None:
            command = STAGES[stage].command
            raise MissingInput(
                f"{self.root}: {command} has not finished there; run `functa {command} {self.config.name}` first, with "
                f"the same --set and --root"
            )
        return record

    def require_begun(self, stage: str) -> None:
        """Raise MissingInput unless the stage was started in this root, StageConflict if with another config."""
        record = read_record(self.location, stage)
        if record is None:
            raise MissingInput(f"{self.root}: {STAGES[stage].command} has not been run there; run it first")
        if is_reused(record):
            raise MissingInput(f"{self.root}: its {stage} is in {record.output}; name the root of that with --root")
        check_same_config(self.location, record, self._wanted(stage, record, self.location), strictly=True)

    def require_inputs(self, stage: str) -> None:
        """Raise MissingInput unless the stages that it needs have finished."""
        required = STAGES[stage].required
        for name in inputs_of(self.config, stage) if required is None else required:
            self.require(name)

    def output(self, record: StageRecord) -> str:
        """Return the URI of a stage's output."""
        return output_location(record, self.location).uri

    def digest(self, stage: str) -> str:
        """Return the digest of the stage's config and its inputs."""
        config = self._wanted(stage, read_record(self.location, stage), self.location)
        return digest({"config": config, "inputs": self.inputs(stage)})

    @contextmanager
    def working(self, stage: str) -> Iterator[StageRecord]:
        """Record a stage's start and, if an exception ends it, its failure; refuse to start beside another process.

        From now on this root refuses another config of the stage. A functaset that could be read before a failure can
        be read after it too, with what was committed.
        """
        with self.location.lock("stages"):  # of two commands that begin at the same moment one goes first
            before = read_record(self.location, stage)
            if before is not None:
                check_nobody_at_work(self.location, before)
            record = self._begin(stage)
        try:
            yield record
        except RootDeleted:
            raise
        except BaseException as error:
            message = " ".join(str(error).split())[:500]
            if not self._is_ours(record):  # what is left is not to look like a run
                if isinstance(error, Exception):
                    raise self._deleted(record, f" ({message})") from error
                raise
            if record.output_digest:
                kept = {"state": "finished", "error": message or type(error).__name__}
                write_record(self.location, record.model_copy(update=kept))
                raise
            state = "failed" if isinstance(error, Exception) else "interrupted"
            by_config = isinstance(error, TrainingFailed) and error.by_config
            ended: dict[str, Any] = {"state": state, "error": message, "by_config": by_config}
            write_record(self.location, record.model_copy(update=ended))
            raise

    def _begin(self, stage: str) -> StageRecord:
        before = read_record(self.location, stage)
        for place in (self.config.images.location, self.config.images.labels):
            if place not in ("", "none"):
                allow_reuse(self.location, place)
        record = StageRecord(
            stage=stage,
            state="running",
            config=self._wanted(stage, before, self.location),
            pipeline=self.config.model_dump(mode="json"),
            stages=stages_of(self.config),
            inputs=self.inputs(stage),
            output=STAGES[stage].output,
            started=now(),
            owner=this_process(),
            device=os.environ.get("CUDA_VISIBLE_DEVICES", ""),
            flow_run=current_flow_run(),
            versions={name: version(name) for name in PACKAGES},
        )
        carried = before is not None and _same_work(before, record) and not is_reused(before)
        if stage == "encode" and before is not None and carried:
            # What it holds can be read however this ends, even by a SIGKILL.
            kept = ("output_digest", "figures", "seconds", "finished")
            record = record.model_copy(update={name: getattr(before, name) for name in kept})
        record = record.model_copy(update={"output": self._output_path(record)})
        for output in (record.output, *(["checkpoints/pixel_classifier"] if stage == "evaluate" else [])):
            refuse_link_out(self.location, output)
        write_record(self.location, record)
        self._begun = time.monotonic()
        return record

    def _output_path(self, record: StageRecord) -> str:
        """Return the output's path: that of the same work begun earlier, else one that replaces no other functaset."""
        before = read_record(self.location, record.stage)
        if before is not None and _same_work(before, record) and not is_reused(before):
            return before.output
        if record.stage == "evaluate":
            return f"runs/{run_id()}"
        if record.stage == "encode" and self.location.exists(f"{record.output}/zarr.json"):
            if read_root(self.location.child(STAGES["encode"].output)).fingerprint == encode_fingerprint(self):
                return record.output
            # It was made by another field or quantiser, and is not ours to delete.
            return f"functaset-{digest([record.config, record.inputs])[:8]}.zarr"
        return record.output

    def finish(self, record: StageRecord, output_digest: str, figures: dict[str, Any]) -> StageRecord:
        """Record that the stage has finished, with its figures; the seconds of a resumed training add up.

        Raises RootDeleted where the record of its start is not there any more.
        """
        if not self._is_ours(record):
            raise self._deleted(record)
        finished = record.model_copy(
            update={
                "state": "finished",
                "output_digest": output_digest,
                "figures": figures,
                "seconds": round(max(self.seconds(), figures.get("seconds", 0.0)), 2),
                "finished": now(),
            }
        )
        write_record(self.location, finished)
        return finished

    def _is_ours(self, record: StageRecord) -> bool:
        """Return whether the record of the stage's start is still there; True where it cannot be read."""
        try:
            found = read_record(self.location, record.stage)
        except StorageError:
            return True
        return found is not None and (found.owner, found.started) == (record.owner, record.started)

    def _deleted(self, record: StageRecord, why: str = "") -> "RootDeleted":
        return RootDeleted(
            f"{self.root}: was deleted, or begun anew, while {STAGES[record.stage].command} worked in it{why}; "
            f"delete what is left there, then run the same command again"
        )

    def seconds(self) -> float:
        """Return the seconds since the stage in progress began."""
        return round(time.monotonic() - self._begun, 2)

    def all_up_to_date(self) -> bool:
        """Return whether every stage of the config is up to date, so that a run has nothing to do."""
        return all(
            [self.current(stage) is not None for stage in stages_of(self.config)]
        )  # all of them: each may refuse


def _same_work(one: StageRecord, other: StageRecord) -> bool:
    return (one.config, one.inputs) == (other.config, other.inputs)


class RootDeleted(StorageError):
    """The root of a stage at work is not there any more, or another run has begun in it."""


class MissingInput(FunctaError):
    """An input of the requested stage does not exist."""


def encode_fingerprint(ledger: Ledger) -> dict[str, Any]:
    """Return the fingerprint of the functaset that this config makes with the finished field."""
    from functa.tasks.encoding.plan import EncodeJob, fingerprint

    field = ledger.require("meta_train")
    job = EncodeJob(
        images=ledger.config.images, encode=ledger.config.encode, field=ledger.output(field),
        field_digest=field.output_digest, functaset="", device="cpu",
    )  # fmt: skip
    described = trained_metadata(open_location(job.field))
    found: dict[str, Any] = json.loads(json.dumps(fingerprint(job, {"inner": {}} | (described or {}))))
    return found


def images_digest(images: Images) -> str:
    """Return a digest of every image's key, label and version in both splits."""
    splits = [images.split(name) for name in ("train", "test")]
    return digest_of_columns([[split.keys, split.labels.tolist(), split.tokens] for split in splits])


def now() -> str:
    """Return the UTC time to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def run_id() -> str:
    """Return the UTC time to the microsecond, so that runs sort."""
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
