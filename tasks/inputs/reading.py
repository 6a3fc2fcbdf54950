"""The reader of a training: in memory, mapped or streamed, and the same order on all ranks of all machines."""

import logging
import time
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from functa.storage.errors import StorageError
from functa.storage.functaset.functaset import Functaset
from functa.storage.readers.hydrate import default_folder, hydrate
from functa.storage.readers.open import fitting_kind, reader_of
from functa.storage.readers.reader import Reader
from functa.storage.readers.shards import SplitShards

logger = logging.getLogger(__name__)

HYDRATION_SECONDS = 30.0  # between lines about its progress

STREAMED = "streamed_to_ranks"  # key of a checkpoint's metadata


class Ranks(Protocol):
    """The processes of one training run, as far as batches depend on them: tasks/training/ranks.py."""

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def on_machine(self) -> int: ...
    @property
    def first_on_machine(self) -> bool: ...

    def part(self, batch: int) -> slice:
        """Return this rank's part of a global batch."""

    def any_of(self, flag: bool) -> bool:
        """Return whether the flag is set on a rank, the same answer on all of them."""


def training_reader(
    functaset: Functaset, ranks: Ranks, plain: bool, begun: Mapping[str, Any] | None, hydrates: bool
) -> Reader:
    """Return the reader of the training split: in memory if it fits on each machine, else mapped, else streamed.

    Memory and mapped files have one order of images, streams have another. So all ranks measure what is free before one
    of them takes it, and stream where one has to; and a training continues in the order in which it began: `begun` is
    the metadata of the checkpoint that it continues from. `hydrates`: what would be streamed is copied to the machine's
    disk first. Raises StorageError where the order cannot be kept.
    """
    shards = SplitShards(functaset, "train", plain)
    kind = fitting_kind(shards, processes=ranks.on_machine)
    continued = STREAMED in (begun or {})
    lacking = ranks.any_of(kind == "streamed")
    if lacking and hydrates and not continued:
        if kind == "streamed" and ranks.first_on_machine:
            _hydrate(functaset, shards.name)
        ranks.any_of(False)  # waits for the copies of all machines
        kind = fitting_kind(shards, processes=ranks.on_machine)
        lacking = ranks.any_of(kind == "streamed")
    if lacking and begun is not None and not continued:
        raise StorageError(
            f"{shards.name}: does not fit into memory now, but did when its training began, in an order that cannot be "
            f"streamed: free memory, use fewer dispatch.devices, or set dispatch.hydrate=true; the training continues"
        )
    if begun is not None and continued and begun[STREAMED] != ranks.world:
        logger.warning(
            "%s: was streamed to %d processes, now to %d: in this epoch some images come twice or not at all",
            shards.name, begun[STREAMED], ranks.world,
        )  # fmt: skip
    return reader_of(shards, "streamed" if lacking or continued else kind)


def _hydrate(functaset: Functaset, name: str) -> None:
    """Copy the training split to this machine's disk, or what is lacking of it. Raises StorageError."""
    logger.warning("%s: does not fit into memory, and is copied to %s first", name, default_folder())
    last = time.monotonic()

    def show(done: int, total: int, written: int) -> None:
        nonlocal last
        if time.monotonic() - last > HYDRATION_SECONDS:
            last = time.monotonic()
            logger.info("copied %d of %d shards, %.1f GB now", done, total, written / 1e9)

    hydrate(functaset, progress=show, split="train")
