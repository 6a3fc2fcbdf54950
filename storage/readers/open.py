"""Readers of a split: in memory while it fits, memory-mapped, or streamed shard by shard. One interface, Reader."""

from typing import Literal

from functa.storage.errors import StorageError
from functa.storage.functaset.functaset import Functaset
from functa.storage.readers.free_memory import free_memory
from functa.storage.readers.mapped import Mapped, mappable
from functa.storage.readers.memory import Resident
from functa.storage.readers.order import Order
from functa.storage.readers.reader import Batch, Indexed, Reader
from functa.storage.readers.shards import SplitShards
from functa.storage.readers.streamed import Streamed

__all__ = ["Batch", "Indexed", "Mapped", "Order", "Reader", "Resident", "Streamed", "open_reader"]

MEMORY_SHARE = 0.6  # of free memory that a split may take

Kind = Literal["memory", "mapped", "streamed"]


def open_reader(
    functaset: Functaset,
    split: str,
    kind: Literal["auto", "memory", "mapped", "streamed"] = "auto",
    *,
    hydrated: str | None = None,
    buffer_shards: int = 8,
    plain: bool = False,
) -> Reader:
    """Return a reader of the visible rows of a split, in batches; latents are raw (not normalised).

    `auto` holds them in memory if they take at most 60 % of what is free (codes count a byte a number), maps them if
    they are hydrated in the folder `hydrated` (default: where `functa store hydrate` puts them) or raw on this
    machine, and else streams them, about twice `buffer_shards` shards in memory. memory and mapped are Indexed: they
    read any rows. plain: images as they are, without their augmentations. Raises StorageError: no such split, nothing
    to show, damage (memory and mapped check everything now, streamed every shard when its turn comes).
    """
    shards = SplitShards(functaset, split, plain)
    if kind == "auto":
        kind = fitting_kind(shards, hydrated)
    return reader_of(shards, kind, hydrated, buffer_shards)


def fitting_kind(shards: SplitShards, hydrated: str | None = None, processes: int = 1) -> Kind:
    """Return how to read a split here. processes: how many of this machine hold it each."""
    if shards.rows * shards.row_bytes <= MEMORY_SHARE * free_memory() / processes:
        return "memory"
    return "mapped" if mappable(shards, hydrated) else "streamed"


def reader_of(shards: SplitShards, kind: Kind, hydrated: str | None = None, buffer_shards: int = 8) -> Reader:
    """Return a reader of this kind. Raises StorageError as open_reader."""
    if not shards.rows:
        raise StorageError(f"{shards.name}: has no row to show: all are bad or retired")
    if kind == "memory":
        return Resident(shards)
    return Mapped(shards, hydrated) if kind == "mapped" else Streamed(shards, buffer_shards)
