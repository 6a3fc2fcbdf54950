"""Batches of a split's rows: how they are dealt out, what one holds, and what every reader of them can do."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from functa.storage.functaset.quantizer import Quantizer
from functa.storage.places.location import refuse_fork


@dataclass(frozen=True)
class Order:
    """How an epoch's rows are dealt out: `batch` rows a step to each of `world` ranks, in an order of (seed, epoch).

    Every rank has equally many steps, and no row goes to two of them. n rows make n // (batch * world) whole steps.
    The rest is left out with `drop_last`. Without, it makes one more step, shared out as evenly as can be: the ranks'
    last batches are short, differ by a row at most, and are empty where fewer rows than ranks are left; so every row
    is seen exactly once. Not shuffled, rows come as they are stored. Raises ValueError for numbers that make no sense.
    """

    batch: int
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = False
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.batch < 1 or self.seed < 0 or not 0 <= self.rank < self.world:
            raise ValueError(f"{self}: batch is 1 at least, seed 0 at least, and rank one of 0 ... world - 1")

    def steps(self, rows: int) -> int:
        """Steps of an epoch of so many rows, the same on every rank."""
        whole, rest = divmod(rows, self.batch * self.world)
        return whole + (rest > 0 and not self.drop_last)

    def part(self, rows: int, step: int) -> slice:
        """This rank's places of a step in the epoch's sequence: the ranks' batches of one step lie side by side."""
        start = step * self.batch * self.world
        rest = min(rows - start, self.batch * self.world)
        return slice(start + self._cut(rest, self.rank), start + self._cut(rest, self.rank + 1))

    def share(self, rows: int) -> tuple[int, int]:
        """This rank's places of the whole epoch as one stretch (start, stop), for readers that go shard by shard."""
        whole, rest = divmod(rows, self.batch * self.world)
        if self.drop_last:
            rest = 0
        start, stop = (whole * self.batch * r + self._cut(rest, r) for r in (self.rank, self.rank + 1))
        return start, stop

    def _cut(self, rows: int, rank: int) -> int:
        """Where a rank's part of so many rows begins."""
        return rows * rank // self.world


@dataclass(frozen=True)
class Batch:
    """Rows of a split: z uint8 codes or float32 [b, s, s, c], labels int32 [b].

    ids uint8 [b, 16] where they were asked for. `which` int64 [b] says which of the reader's quantizers each row's
    codes take, where it has several.
    """

    z: np.ndarray
    labels: np.ndarray
    ids: np.ndarray | None = None
    which: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)


class Reader(ABC):
    """The visible rows of one split of a committed version, in batches. All bytes are checked before they are shown.

    Every method raises StorageError: what is missing, short, altered or swapped is named, never filled in. A reader
    belongs to the process that opened it: a fork's threads, locks and connections are not there.
    """

    def __init__(
        self, name: str, rows: int, latent_shape: tuple[int, int, int], quantizers: Sequence[Quantizer]
    ) -> None:
        self.name = name  # of the store and the split, in errors
        self.rows = rows
        self.latent_shape = latent_shape
        self.quantizers = tuple(quantizers)  # empty: rows are float32
        self._process = os.getpid()

    def __len__(self) -> int:
        return self.rows

    @property
    def dtype(self) -> np.dtype:
        """Of Batch.z: uint8 codes or float32."""
        return np.dtype(np.uint8 if self.quantizers else np.float32)

    def batches(
        self, order: Order, epoch: int = 0, step: int = 0, *, ids: bool = False, reuse: bool = False
    ) -> Iterator[Batch]:
        """This rank's batches of an epoch from `step` on: a function of order and epoch alone.

        What was consumed before `step` is not read again. `reuse`: each batch's z lies where the last one's lay,
        which spares the memory's first touch; copy what must outlive a step. Raises ValueError for a step that the
        epoch does not have.
        """
        self.own()
        if epoch < 0 or not 0 <= step <= order.steps(self.rows):
            raise ValueError(f"epoch {epoch}, step {step}: an epoch has steps 0 to {order.steps(self.rows)}")
        return self._batches(order, epoch, step, ids, reuse)

    @abstractmethod
    def _batches(self, order: Order, epoch: int, step: int, ids: bool, reuse: bool) -> Iterator[Batch]: ...

    def own(self) -> None:
        """Raises StorageError in a process that was forked after the reader was opened."""
        refuse_fork(self._process, self.name)

    @cached_property
    def affine(self) -> tuple[np.ndarray, np.ndarray]:
        """(scale, offset) float64 [q, s, s, c], one of each quantizer: z = code * scale + offset. For coded rows."""
        scales = [np.broadcast_to(q.step.astype(np.float64), self.latent_shape) for q in self.quantizers]
        lows = [np.broadcast_to(q.low.astype(np.float64), self.latent_shape) for q in self.quantizers]
        scale, low = np.stack(scales), np.stack(lows)
        return scale, low + scale / 2

    def dequantized(self, batch: Batch, out: np.ndarray | None = None) -> np.ndarray:
        """float32 [b, s, s, c] of a batch, into `out` if given; equal to Quantizer.decode up to float32's rounding."""
        if not self.quantizers:
            return batch.z
        scale, offset = self._narrow
        if batch.which is None:
            scale, offset = scale[0], offset[0]
        else:
            scale, offset = scale[batch.which], offset[batch.which]
        z = np.multiply(batch.z, scale, out=None if out is None else out[: len(batch)], dtype=np.float32)
        return np.add(z, offset, out=z)

    @cached_property
    def _narrow(self) -> tuple[np.ndarray, np.ndarray]:
        scale, offset = self.affine
        return scale.astype(np.float32), offset.astype(np.float32)


class Indexed(Reader):
    """A reader that has every row at hand; labels int32 [n] and ids uint8 [n, 16] of them all in memory."""

    labels: np.ndarray
    ids: np.ndarray

    def read(self, rows: np.ndarray, *, ids: bool = False, out: np.ndarray | None = None) -> Batch:
        """The rows asked for, int [b], numbered 0 ... rows - 1 as they are stored; z in `out` [b, s, s, c] if given.

        Raises IndexError outside.
        """
        self.own()
        if len(rows) and (rows.min() < 0 or rows.max() >= self.rows):
            raise IndexError(f"{self.name}: rows {rows.min()} to {rows.max()} of {self.rows}")
        return self._read(rows, ids, out)

    @abstractmethod
    def _read(self, rows: np.ndarray, ids: bool, out: np.ndarray | None) -> Batch: ...

    def _batches(self, order: Order, epoch: int, step: int, ids: bool, reuse: bool) -> Iterator[Batch]:
        sequence = epoch_order(self.rows, order.seed, epoch) if order.shuffle else np.arange(self.rows)
        room = np.empty((order.batch, *self.latent_shape), self.dtype) if reuse else None
        for number in range(step, order.steps(self.rows)):
            self.own()
            rows = sequence[order.part(self.rows, number)]
            yield self._read(rows, ids, None if room is None else room[: len(rows)])


def distinct(quantizers: Sequence[Quantizer | None]) -> tuple[list[Quantizer], list[int]]:
    """The different ones among quantisers, and for each given one which it is (0 for None)."""
    found: dict[tuple[bytes, bytes, tuple[int, ...]], int] = {}
    kept: list[Quantizer] = []
    numbers = []
    for quantizer in quantizers:
        if quantizer is None:
            numbers.append(0)
            continue
        key = (quantizer.low.tobytes(), quantizer.step.tobytes(), quantizer.low.shape)
        if key not in found:
            found[key] = len(kept)
            kept.append(quantizer)
        numbers.append(found[key])
    return kept, numbers


@lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of n rows, a function of (seed, epoch) alone, int64 [n], read-only."""
    order = np.random.default_rng([seed, epoch]).permutation(n)
    order.flags.writeable = False
    return order
