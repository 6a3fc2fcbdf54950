"""Readers of a split: in memory while it fits, memory-mapped, or streamed shard by shard. One interface, Reader."""

from pathlib import Path
from typing import Literal

import psutil

from functa.storage.errors import StorageError
from functa.storage.functaset.functaset import Functaset
from functa.storage.readers.mapped import Mapped, mappable
from functa.storage.readers.memory import Resident
from functa.storage.readers.order import Order
from functa.storage.readers.reader import Batch, Indexed, Reader
from functa.storage.readers.shards import SplitShards
from functa.storage.readers.streamed import Streamed

__all__ = ["Batch", "Indexed", "Mapped", "Order", "Reader", "Resident", "Streamed", "free_memory", "open_reader"]

MEMORY_SHARE = 0.6  # of free memory that a split may take

ROW_BYTES = 24  # label, id and quantiser beside a row's latent

CONTROL_GROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def open_reader(
    functaset: Functaset,
    split: str,
    kind: Literal["auto", "memory", "mapped", "streamed"] = "auto",
    *,
    hydrated: str | None = None,
    buffer_shards: int = 8,
    plain: bool = False,
    processes: int = 1,
) -> Reader:
    """Return a reader of the visible rows of a split, in batches; latents are raw (not normalised).

    `auto` holds them in memory if they take at most 60 % of what is free (codes count a byte a number), maps them if
    they are hydrated in the folder `hydrated` (default: where `functa store hydrate` puts them) or raw on this
    machine, and else streams them, two pools of `buffer_shards` shards in memory. memory and mapped are Indexed: they
    read any rows. plain: images as they are, without their augmentations. processes: how many of this machine hold
    the split each. Raises StorageError: no such split, nothing to show, damage (memory and mapped check everything
    now, streamed every shard when its turn comes).
    """
    shards = SplitShards(functaset, split, plain)
    if not shards.rows:
        raise StorageError(f"{shards.name}: has no row to show: all are bad or retired")
    if kind == "auto":
        row = int(shards.dtype.itemsize * shards.latent_shape[0] * shards.latent_shape[1] * shards.latent_shape[2])
        fits = shards.rows * (row + ROW_BYTES) <= MEMORY_SHARE * free_memory() / processes
        kind = "memory" if fits else "mapped" if mappable(shards, hydrated) else "streamed"
    if kind == "memory":
        return Resident(shards)
    return Mapped(shards, hydrated) if kind == "mapped" else Streamed(shards, buffer_shards)


def free_memory() -> int:
    """Return the bytes that this process may still take: of the machine, or of its control group if that is less."""
    free = int(psutil.virtual_memory().available)
    for folder, limit, usage, cached in CONTROL_GROUPS:
        try:
            allowed = int(Path(folder, limit).read_text())
            used = int(Path(folder, usage).read_text())
            statistics = dict(line.split() for line in Path(folder, "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such control group, or no limit ("max")
            continue
        free = min(free, allowed - used + int(statistics.get(cached, 0)))
    return max(0, free)
