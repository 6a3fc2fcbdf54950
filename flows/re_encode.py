"""Encode again by schedule or event what was added, changed or removed, with the root's own config."""

import time
from contextlib import nullcontext

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from pydantic import ValidationError

from functa.flows.config.load import recorded_config
from functa.flows.config.schema import PipelineConfig
from functa.flows.ledger import MissingInput
from functa.flows.server.at_work import check_nobody_at_work
from functa.flows.server.worker import gpu_slot, moved_to_cpu_queue, outlive_the_worker, started_by_worker
from functa.flows.stages import encode
from functa.storage.config import ImagesConfig
from functa.storage.errors import StorageError
from functa.storage.images.patterns import split_pattern
from functa.storage.places.address import open_location
from functa.storage.runs.stage_records import StageRecord, is_reused, read_record
from functa.tasks.config import DispatchConfig

POLL_SECONDS = 5.0

PATIENCE_SECONDS = 24 * 3600.0  # behind another encoding of the same root


@flow(name="re-encode", flow_run_name="re-encode {root}", persist_result=False)
def re_encode(root: str, *, images: str = "", dispatch: DispatchConfig | None = None) -> State[None] | None:
    """Encode the images of a root that are new or changed, and retire the rows of those that are missing.

    The config is the one of the root's last encoding, but for the addresses and devices in it: whoever made the root
    does not decide what this worker connects to. Another encoding of the root is waited for.

    Args:
        root: The root of the functaset's run: a folder or s3://bucket/prefix.
        images: The folder that an event reports new images in, within the root's source. Empty: run by schedule.
        dispatch: Use this dispatch instead of the one that the root was encoded with. A Dask cluster's address and
            the device are taken from here alone.
    """
    if started_by_worker():
        outlive_the_worker()
    if not root.strip():
        raise MissingInput(
            "an event without payload.root: `functa notify ROOT --images URI` sends one that names the root"
        )
    record = read_record(open_location(root), "encode")
    if record is None and not images:
        get_run_logger().info(f"{root}: nothing has been encoded there yet, so there is nothing to do again")
        return None
    on_pool = (dispatch or _check(root, images).dispatch).runner == "prefect"
    if on_pool and (moved := moved_to_cpu_queue()):
        return moved
    begun = time.monotonic()
    while True:
        _wait_for_others(root, begun)
        with nullcontext() if on_pool else gpu_slot():
            if not others_at_work(root):  # one may have started while this waited for its slot
                config = _check(root, images)  # the encoding waited for may have used another config
                used = without_addresses(config.dispatch) if dispatch is None else dispatch
                encode(root, config=config.model_copy(update={"dispatch": used}))
                return None


def without_addresses(recorded: DispatchConfig) -> DispatchConfig:
    """Return the dispatch of a root's record without the address and the devices that the record's writer chose."""
    if recorded.address is not None:
        get_run_logger().warning(
            f"dispatch.address={recorded.address} of the root's record is not used, since whoever made the root chose "
            f"it; name the cluster in the deployment's parameter dispatch"
        )
    defaults = DispatchConfig()
    return recorded.model_copy(update={"address": None, "device": defaults.device, "devices": defaults.devices})


def _check(root: str, images: str) -> PipelineConfig:
    """Return the root's own config. Raises MissingInput without one, or for images that are not its own."""
    config = config_to_repeat(root, read_record(open_location(root), "encode"))
    if images:
        check_source(root, config.images, images)
    return config


def config_to_repeat(root: str, record: StageRecord | None) -> PipelineConfig:
    """Return the config that the root was encoded with. Raises MissingInput if its record has none, or it has none."""
    if record is None:
        raise MissingInput(f"{root}: nothing has been encoded there; run `functa encode PRESET --root {root}` first")
    if is_reused(record):
        raise MissingInput(f"{root}: its functaset is in {record.output}; name the root of that")
    try:
        return recorded_config(record)
    except ValidationError as error:
        fault = str(error.errors()[0]["msg"]) if record.pipeline else "its record has none"
        raise MissingInput(
            f"{root}: the config of its encoding cannot be used again ({fault}); run `functa encode` there once"
        ) from None


def check_source(root: str, source: ImagesConfig, images: str) -> None:
    """Raise MissingInput if the new images are not in the root's source."""
    if not source.location:
        raise MissingInput(f"{root}: images.source={source.source} reads no location, so no images can be added to it")
    folder, _ = split_pattern(source.location)
    ours, theirs = (open_location(uri).uri.rstrip("/") for uri in (folder, images))
    if theirs != ours and not theirs.startswith(ours + "/"):
        raise MissingInput(f"{root}: images arrived in {images}, but it reads those in {source.location}")


def _wait_for_others(root: str, begun: float) -> None:
    """Return once no other process encodes into the root. Raise StorageError after a day."""
    logged = False
    while others := others_at_work(root):
        if time.monotonic() - begun > PATIENCE_SECONDS:
            raise StorageError(f"gave up after {PATIENCE_SECONDS / 3600:.0f} hours: {others}")
        if not logged:
            get_run_logger().info(f"waits: {others}")
            logged = True
        time.sleep(POLL_SECONDS)


def others_at_work(root: str) -> str:
    """Return a line about the process that encodes into the root, or an empty string."""
    location = open_location(root)
    record = read_record(location, "encode")
    try:
        if record is not None:
            check_nobody_at_work(location, record)
    except StorageError as error:
        return str(error)
    return ""
