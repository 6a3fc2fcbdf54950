"""Encoding again by schedule or event: what came, changed or went since the last time, by the root's own config."""

import time

from prefect import flow, get_run_logger
from pydantic import ValidationError

from functa.flows.config.schema import PipelineConfig
from functa.flows.ledger import MissingInput
from functa.flows.server.at_work import check_nobody_at_work
from functa.flows.server.worker import gpu_slot, outlive_the_worker, started_by_worker
from functa.flows.stages import encode
from functa.storage.config import ImagesConfig
from functa.storage.errors import StorageError
from functa.storage.places.address import open_location
from functa.storage.runs.stage_records import StageRecord, is_borrowed, read_record
from functa.tasks.config import DispatchConfig

POLL_SECONDS = 5.0

PATIENCE_SECONDS = 24 * 3600.0  # behind another encoding of the same root


@flow(name="re-encode", flow_run_name="re-encode {root}", persist_result=False)
def re_encode(root: str, *, images: str = "", dispatch: DispatchConfig | None = None) -> None:
    """Encodes the images of a root that are new or changed, and no longer shows those that are gone.

    Its config is the one that the root was last encoded by. Another encoding of the root is waited for.

    Args:
        root: Where the functaset stands: a folder or s3://bucket/prefix.
        images: Where images arrived, as an event tells; they must be of the root's own source. Empty: by schedule.
        dispatch: Another dispatch than the one that the root was encoded with.
    """
    if started_by_worker():
        outlive_the_worker()
    if not root.strip():
        raise MissingInput("an event without payload.root: `functa notify ROOT --images URI` says which root it is for")
    record = read_record(open_location(root), "encode")
    if record is None and not images:
        get_run_logger().info(f"{root}: nothing has been encoded there yet, so there is nothing to do again")
        return
    _check(root, images)
    begun = time.monotonic()
    while True:
        _wait_for_others(root, begun)
        with gpu_slot():
            if not others_at_work(root):  # while this waited for its slot
                config = _check(root, images)  # what was waited for may have encoded by another one
                encode(root, config=config if dispatch is None else config.model_copy(update={"dispatch": dispatch}))
                return


def _check(root: str, images: str) -> PipelineConfig:
    """The root's own config. Raises MissingInput where there is none, or images arrived that are not the root's."""
    config = config_to_repeat(root, read_record(open_location(root), "encode"))
    if images:
        check_source(root, config.images, images)
    return config


def config_to_repeat(root: str, record: StageRecord | None) -> PipelineConfig:
    """By which the root was encoded. Raises MissingInput: it never was, elsewhere, or by a version that did not say."""
    if record is None:
        raise MissingInput(f"{root}: nothing has been encoded there; run `functa encode PRESET --root {root}` first")
    if is_borrowed(record):
        raise MissingInput(f"{root}: its functaset lies in {record.output}; name the root of that")
    try:
        return PipelineConfig.model_validate(record.pipeline)
    except ValidationError as error:
        fault = str(error.errors()[0]["msg"]) if record.pipeline else "it does not say one"
        raise MissingInput(
            f"{root}: the config of its encoding cannot be used again ({fault}); run `functa encode` there once"
        ) from None


def check_source(root: str, source: ImagesConfig, images: str) -> None:
    """Raises MissingInput where images arrived that are not the root's."""
    if not source.location:
        raise MissingInput(f"{root}: images.source={source.source} reads no location, so no images can be added to it")
    ours, theirs = (open_location(uri).uri.rstrip("/") for uri in (source.location, images))
    if theirs != ours and not theirs.startswith(ours + "/"):
        raise MissingInput(f"{root}: images arrived in {images}, but it reads those in {source.location}")


def _wait_for_others(root: str, begun: float) -> None:
    """Returns when no other process encodes into the root. Raises StorageError after a day."""
    told = False
    while others := others_at_work(root):
        if time.monotonic() - begun > PATIENCE_SECONDS:
            raise StorageError(f"gave up after {PATIENCE_SECONDS / 3600:.0f} hours: {others}")
        if not told:
            get_run_logger().info(f"waits: {others}")
            told = True
        time.sleep(POLL_SECONDS)


def others_at_work(root: str) -> str:
    """Who encodes into the root; empty: nobody."""
    location = open_location(root)
    record = read_record(location, "encode")
    try:
        if record is not None:
            check_nobody_at_work(location, record)
    except StorageError as error:
        return str(error)
    return ""
