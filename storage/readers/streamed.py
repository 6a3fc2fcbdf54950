"""A split that does not fit into memory: whole shards in random order, whose rows are dealt out over a long stretch.

An epoch's sequence is the shards in an order of (seed, epoch), cut into one stretch of rows for each rank; a rank may
begin or end within a shard. A row's key is its position in the stretch and a random delay of less than `spread` rows;
rows are dealt out in the order of their keys, while a thread reads the next shard. So memory holds half of `spread`
and three shards, whatever the number of rows, and every byte is checked again in every epoch.

Where images have augmentations, their rows lie side by side, and leave as far apart as can be. A training takes one row
of each image, drawn anew in each epoch; the others are read and dropped.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from threading import Event

import numpy as np

from functa.storage.readers.dealing import Waiting, delays, image_starts
from functa.storage.readers.order import Order, epoch_order
from functa.storage.readers.prefetch import prefetched
from functa.storage.readers.reader import Batch, Reader
from functa.storage.readers.shards import SplitShards

HELD_BATCHES = 32  # of a training, in memory: enough that the images of a batch are unrelated

HELD_BYTES = 512 << 20  # of a training, in memory, if that is less

SPARE = 16  # a part of the rows in memory is added: how many there are is up to chance

READERS = 16  # threads that read ids, which are small objects


@dataclass(frozen=True)
class _Piece:
    """Rows of a shard (its position, rows from, to) in a rank's stretch, and where they begin there."""

    shard: int
    start: int
    stop: int
    begin: int

    @property
    def end(self) -> int:
        return self.begin + self.stop - self.start


@dataclass(frozen=True)
class _Deal:
    """The dealing of an epoch: keys spread over so many rows (0: as stored); `whole`: memory holds all rows."""

    order: Order
    epoch: int
    spread: int
    whole: bool


class Streamed(Reader):
    """Visible rows shard by shard, from any location. The more of them are in memory, the better the shuffle.

    one_each: an epoch has one row of each image, not all of its augmentations; `rows` is the number of images then.
    """

    def __init__(self, split: SplitShards, buffer_shards: int = 8, one_each: bool = False) -> None:
        if buffer_shards < 1:
            raise ValueError(f"buffer_shards {buffer_shards}: one shard at least")
        self._images = _images_by_shard(split) if one_each else None
        self._counts = split.counts if self._images is None else np.array([len(starts) for starts in self._images])
        super().__init__(split.name, int(self._counts.sum()), split.latent_shape, split.quantizers)
        self._split = split
        self._held = 2 * buffer_shards * -(-self.rows // max(1, len(self._counts)))

    def for_training(self, batch: int, one_each: bool) -> "Streamed":
        """Return the reader with HELD_BATCHES batches in memory, or HELD_BYTES if that is less.

        The sizes follow from the data alone: a training that continues on another machine has the same order.
        """
        reader, row = Streamed(self._split, 1, one_each), self.dtype.itemsize * int(np.prod(self.latent_shape))
        reader._held = max(1, min(HELD_BATCHES * batch, HELD_BYTES // row))
        return reader

    def _batches(self, order: Order, epoch: int, step: int, ids: bool, reuse: bool) -> Iterator[Batch]:
        start, stop = order.share(self.rows)
        sizes, rows = _sizes(stop - start, order, self.rows), stop - start
        whole = order.shuffle and rows <= self._held
        deal = _Deal(order, epoch, (rows if whole else 2 * self._held) if order.shuffle else 0, whole)
        skip, pieces = sum(sizes[:step]), list(self._pieces(order, epoch, start, stop))
        # The rows of a piece are among the first end + spread: consumed before, they are not read.
        pieces = [piece for piece in pieces if piece.end + deal.spread > skip or whole]
        skip -= pieces[0].begin if pieces else skip
        buffer = np.empty((order.batch, *self.latent_shape), self.dtype) if reuse else None
        stopped = Event()
        calls = (partial(self._load, piece, deal, ids, stopped) for piece in pieces)
        with closing(prefetched(calls)) as loaded:
            supply = _Supply(Waiting(self._places(deal, pieces), self.latent_shape, self.dtype), pieces, loaded, whole)
            try:
                supply.skip(skip)
                for size in sizes[step:]:
                    self.own()
                    z = np.empty((size, *self.latent_shape), self.dtype) if buffer is None else buffer[:size]
                    yield supply.wait(size).deal(z, ids, len(self.quantizers) > 1)
            finally:
                stopped.set()

    def _places(self, deal: _Deal, pieces: list[_Piece]) -> int:
        """Return how many rows are in memory at once: half of those whose keys are spread, a batch and a shard."""
        rows = sum(piece.stop - piece.start for piece in pieces)
        largest = max((piece.stop - piece.start for piece in pieces), default=0)
        held = rows if deal.whole else deal.spread // 2
        return min(rows, held + held // SPARE + deal.order.batch + largest)

    def _pieces(self, order: Order, epoch: int, start: int, stop: int) -> Iterator[_Piece]:
        """Yield the pieces of this rank's stretch of the epoch's sequence, in order."""
        counts = self._counts
        sequence = epoch_order(len(counts), order.seed, epoch) if order.shuffle else np.arange(len(counts))
        ends = np.cumsum(counts[sequence])
        for shard, count, end in zip(sequence.tolist(), counts[sequence].tolist(), ends.tolist(), strict=True):
            first = end - count
            if end > start and first < stop and count:
                begin = max(start, first)
                yield _Piece(shard, begin - first, min(stop, end) - first, begin - start)

    def _load(self, piece: _Piece, deal: _Deal, ids: bool, stopped: Event) -> tuple[Batch, np.ndarray] | None:
        """Read a piece's rows and draw their keys; None once nobody waits for them any more."""
        if stopped.is_set():
            return None
        number, order, here = piece.shard, deal.order, slice(piece.start, piece.stop)
        shard, apart = self._split.shards[number], self._split.augmented and self._images is None and order.shuffle
        read = self._split.read(shard, ids or apart)
        wanted: np.ndarray | slice = here if self._images is None else self._wanted(number, order, deal.epoch)[here]
        which = np.full(piece.stop - piece.start, self._split.quantizer_number(shard), np.int64)
        names = read.ids[wanted] if ids and read.ids is not None else None
        rows = Batch(read.z[wanted], read.labels[wanted], names, which)
        random = np.random.default_rng([order.seed, deal.epoch, number, 1])
        images = image_starts(read.ids) if apart and read.ids is not None else None
        late = deal.spread * delays(int(self._counts[number]), images, random)[here]
        return rows, late if deal.whole else piece.begin + np.arange(len(late)) + late

    def _wanted(self, number: int, order: Order, epoch: int) -> np.ndarray:
        """Return the positions among a shard's rows that an epoch has: all, or one of each image, drawn."""
        if self._images is None:
            return np.arange(self._counts[number])
        starts = self._images[number]
        ends = np.append(starts[1:], self._split.counts[number])
        drawn = np.random.default_rng([order.seed, epoch, number]).random(len(starts))
        return starts + (drawn * (ends - starts)).astype(np.int64)


def _images_by_shard(split: SplitShards) -> list[np.ndarray]:
    """Return of each shard the positions where the rows of an image begin, int32 [images].

    An image whose rows go on in the next shard counts in the first of them, so that no epoch has it twice.
    """
    found: list[np.ndarray] = []
    before: tuple[object, int, bytes] | None = None
    with ThreadPoolExecutor(READERS) as pool:
        for shard, ids in zip(split.shards, pool.map(lambda shard: shard.columns("id")["id"], split.shards)):
            starts = image_starts(ids)
            first, last = ids[0].tobytes(), ids[-1].tobytes()
            if before == (shard.fragment, shard.number - 1, first):
                starts = starts[1:]
            before = (shard.fragment, shard.number, last)
            found.append(starts.astype(np.int32))
    return found


class _Supply:
    """The rows of an epoch: those that wait, and pieces that are read when more must wait."""

    def __init__(
        self,
        waiting: Waiting,
        pieces: list[_Piece],
        loaded: Iterator[tuple[Batch, np.ndarray] | None],
        whole: bool,
    ) -> None:
        self._waiting, self._whole = waiting, whole
        self._left, self._loaded = iter(pieces), loaded
        self._last = pieces[-1] if pieces else None
        self._below = 0.0  # the key below which every row is there

    def wait(self, count: int) -> Waiting:
        """Return the waiting rows once the next `count` of them are known."""
        while self._waiting.ready(self._below) < count:
            self._read()
        return self._waiting

    def skip(self, count: int) -> None:
        """Let rows leave that were consumed before, as soon as they are known."""
        while count:
            leaving = min(count, self.wait(1).ready(self._below))
            self._waiting.drop(leaving)
            count -= leaving

    def _read(self) -> None:
        piece, read = next(self._left), next(self._loaded)
        assert read is not None
        self._waiting.add(*read)
        if piece is self._last:
            self._below = math.inf
        elif not self._whole:
            self._below = piece.end


def _sizes(rows: int, order: Order, total: int) -> list[int]:
    """Return the sizes of this rank's batches of an epoch of `total` rows, of which it has `rows`."""
    steps = order.steps(total)
    return [min(order.batch, rows - step * order.batch) for step in range(steps)]
