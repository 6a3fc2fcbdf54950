"""torch data sets over a functaset's readers, for training loops of your own."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from functa.models.latents.normalize import Affine, Normalizer
from functa.storage.functaset.functaset import Functaset
from functa.storage.readers.open import open_reader
from functa.storage.readers.order import Order
from functa.storage.readers.reader import Batch, Indexed, Reader


@dataclass(frozen=True)
class _Source:
    """The arguments with which a worker process opens its own reader."""

    uri: str
    split: str
    version: int
    kind: Literal["auto", "memory", "mapped", "streamed"]
    hydrated: str | None
    buffer_shards: int

    def open(self) -> Reader:
        functaset = Functaset.open(self.uri, self.version)
        kind, folder = self.kind, self.hydrated
        return open_reader(functaset, self.split, kind, hydrated=folder, buffer_shards=self.buffer_shards)


class _Latents:
    """A reader that is opened again after unpickling, and its batches as tensors.

    A spawned worker opens its own reader; a forked one has its parent's, which refuses to read (StorageError).
    """

    def __init__(
        self,
        uri: str,
        split: str,
        *,
        normalizer: Normalizer | None = None,
        codes: bool = False,
        version: int | None = None,
        kind: Literal["auto", "memory", "mapped", "streamed"] = "auto",
        hydrated: str | None = None,
        buffer_shards: int = 8,
    ) -> None:
        version = Functaset.open(uri, version).version  # fixed: workers must not see a newer commit
        self._source = _Source(uri, split, version, kind, hydrated, buffer_shards)
        self._normalizer, self._codes = normalizer, codes
        self._reader: Reader | None = self._source.open()

    @property
    def reader(self) -> Reader:
        """Return this process's reader. Raises StorageError in a fork of the process that opened it."""
        if self._reader is None:
            self._reader = self._source.open()
        self._reader.own()
        return self._reader

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reader": None}

    @property
    def affine(self) -> Affine | None:
        """Return a module that dequantises and normalises codes on any device (.to); None if rows are float32."""
        if not self.reader.quantizers:
            return None
        plain = Normalizer(torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
        return (self._normalizer or plain).fused(*self.reader.affine)

    def _tensors(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor]:
        z, labels = torch.from_numpy(batch.z), torch.from_numpy(batch.labels.astype(np.int64))
        which = None if batch.which is None else torch.from_numpy(batch.which)
        if self._codes:
            return z, labels, torch.zeros_like(labels) if which is None else which
        affine = self.affine
        if affine is not None:
            return affine(z, which), labels
        return (z if self._normalizer is None else self._normalizer.normalize(z)), labels


class LatentDataset(_Latents, Dataset):
    """Map-style: (x float32 [s, s, c], label int64) in the store's order, normalised if a normaliser is given.

    With codes=True (x as stored, label, quantiser's number), for `affine` on the device. `kind` is as in open_reader,
    without streamed: ValueError if auto would stream. A DataLoader reads whole batches at once.
    """

    def __init__(self, uri: str, split: str, **options: Any) -> None:
        super().__init__(uri, split, **options)
        if not isinstance(self.reader, Indexed):
            raise ValueError(f"{self.reader.name}: does not fit into memory; hydrate it, or use LatentStream")

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, row: int) -> tuple[Tensor, ...]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: list[int]) -> list[tuple[Tensor, ...]]:
        reader = self.reader
        assert isinstance(reader, Indexed)
        return list(zip(*self._tensors(reader.read(np.asarray(rows, np.int64)))))


class LatentStream(_Latents, IterableDataset):
    """Iterable: whole batches (x float32 [b, s, s, c], labels int64 [b]) of an Order; DataLoader(..., batch_size=None).

    With codes=True (x as stored, labels, quantisers' numbers [b]). Each iteration is one epoch, starting at the
    (epoch, step) that `resume` set; the next iteration is the next epoch. Workers of a DataLoader get a copy, so with
    them call `resume` before every epoch. Several workers yield the same batches in the same order; a streamed reader
    has its own thread and allows one worker at most (ValueError).
    """

    def __init__(self, uri: str, split: str, order: Order, **options: Any) -> None:
        super().__init__(uri, split, **options)
        self._order, self._next = order, (0, 0)

    def resume(self, epoch: int, step: int = 0) -> None:
        """Set where the next iteration begins. Call it in the process that makes the DataLoader's iterator."""
        self._next = epoch, step

    def __len__(self) -> int:
        return self._order.steps(len(self.reader))

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        epoch, step = self._next
        self._next = epoch + 1, 0
        worker = get_worker_info()
        if worker is None or worker.num_workers == 1:
            return (self._tensors(batch) for batch in self.reader.batches(self._order, epoch, step))
        return self._of_worker(epoch, step, worker.id, worker.num_workers)

    def _of_worker(self, epoch: int, step: int, worker: int, workers: int) -> Iterator[tuple[Tensor, ...]]:
        """Yield every workers-th batch: a DataLoader asks its workers in turn."""
        reader = self.reader
        if not isinstance(reader, Indexed):
            raise ValueError(f"{reader.name}: is streamed by its own thread; use num_workers=0 or 1")
        for number in range(step + worker, self._order.steps(len(reader)), workers):
            yield self._tensors(next(reader.batches(self._order, epoch, number)))
