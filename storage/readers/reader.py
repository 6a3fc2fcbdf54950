"""Batches of a split's rows: what one holds, and what every reader of them can do."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from functa.storage.functaset.quantizer import Quantizer
from functa.storage.places.location import refuse_fork
from functa.storage.readers.order import Order, epoch_order


@dataclass(frozen=True)
class Batch:
    """Rows of a split: z uint8 codes or float32 [b, s, s, c], labels int32 [b].

    ids uint8 [b, 16] where they were asked for. `which` int64 [b] is the number of each row's quantizer
    among the reader's, where it has several.
    """

    z: np.ndarray
    labels: np.ndarray
    ids: np.ndarray | None = None
    which: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Batch({len(self):,} rows of {'x'.join(map(str, self.z.shape[1:]))}, {self.z.dtype})"


class Reader(ABC):
    """The visible rows of one split of a committed version, in batches. All bytes are checked before they are shown.

    Latents are raw, as the inner loop found them: normalise them before they train anything. Every method raises
    StorageError: what is missing, short, altered or swapped is named, never filled in. A reader
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

    def __repr__(self) -> str:
        kind = "codes" if self.quantizers else "float32"
        return f"{type(self).__name__}({self.name}: {self.rows:,} rows of {self.latent_shape}, {kind})"

    def __len__(self) -> int:
        return self.rows

    @property
    def dtype(self) -> np.dtype:
        """Type of Batch.z: uint8 codes or float32."""
        return np.dtype(np.uint8 if self.quantizers else np.float32)

    def batches(
        self, order: Order, epoch: int = 0, step: int = 0, *, ids: bool = False, reuse: bool = False
    ) -> Iterator[Batch]:
        """Yield this rank's batches of an epoch from `step` on: a function of order and epoch alone.

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
        """Check that this process opened it. Raises StorageError in a fork."""
        refuse_fork(self._process, self.name)

    @cached_property
    def affine(self) -> tuple[np.ndarray, np.ndarray]:
        """(scale, offset) float64 [q, s, s, c], one of each quantizer: z = code * scale + offset. For coded rows."""
        scales = [np.broadcast_to(q.step.astype(np.float64), self.latent_shape) for q in self.quantizers]
        lows = [np.broadcast_to(q.low.astype(np.float64), self.latent_shape) for q in self.quantizers]
        scale, low = np.stack(scales), np.stack(lows)
        return scale, low + scale / 2

    def dequantized(self, batch: Batch, out: np.ndarray | None = None) -> np.ndarray:
        """Return float32 [b, s, s, c] of a batch, in `out` if given; equal to Quantizer.decode up to rounding."""
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
        """Read rows, int [b], numbered 0 ... rows - 1 as they are stored; z in `out` [b, s, s, c] if given.

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
        buffer = np.empty((order.batch, *self.latent_shape), self.dtype) if reuse else None
        for number in range(step, order.steps(self.rows)):
            self.own()
            rows = sequence[order.part(self.rows, number)]
            yield self._read(rows, ids, None if buffer is None else buffer[: len(rows)])
