"""A split that does not fit into memory: whole shards in random order, rows shuffled within a pool of several.

An epoch's sequence is the shards in an order of (seed, epoch), cut into one stretch of rows for each rank; a rank may
begin or end within a shard. A rank's stretch is read in pools of `buffer_shards` shards, whose rows are permuted; while
one pool is dealt out, a thread reads the next. Batches run across pools. So memory holds two pools and a shard,
whatever the number of rows, and every byte is checked again in every epoch.

Where images have augmentations, their rows lie side by side; a training takes one row of each image, drawn anew in each
epoch. The others are read and dropped.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from threading import Event

import numpy as np

from functa.storage.readers.order import Order, epoch_order
from functa.storage.readers.prefetch import prefetched
from functa.storage.readers.reader import Batch, Reader
from functa.storage.readers.shards import SplitShards

POOL_BATCHES = 16  # of a training's pool: enough that the images of a batch are unrelated

POOL_BYTES = 1 << 30  # of a training's pool, of which two are in memory

READERS = 16  # threads that read ids, which are small objects


@dataclass(frozen=True)
class _Pool:
    """Pieces of shards that are shuffled together: (the shard's position, its rows from, to), and the pool's number."""

    number: int
    pieces: tuple[tuple[int, int, int], ...]

    @property
    def rows(self) -> int:
        return sum(stop - start for _, start, stop in self.pieces)


class Streamed(Reader):
    """Visible rows shard by shard, from any location. The larger the pool, the better the shuffle.

    one_each: an epoch has one row of each image, not all of its augmentations; `rows` is the number of images then.
    """

    def __init__(self, split: SplitShards, buffer_shards: int = 8, one_each: bool = False) -> None:
        if buffer_shards < 1:
            raise ValueError(f"buffer_shards {buffer_shards}: one shard at least")
        self._images = _images_by_shard(split) if one_each else None
        self._counts = split.counts if self._images is None else np.array([len(starts) for starts in self._images])
        super().__init__(split.name, int(self._counts.sum()), split.latent_shape, split.quantizers)
        self._split, self._buffer_shards = split, buffer_shards

    def for_training(self, batch: int, one_each: bool) -> "Streamed":
        """Return the reader with pools of POOL_BATCHES batches, or of POOL_BYTES if that is less, but of a shard.

        The sizes follow from the data alone: a training that continues on another machine has the same order.
        """
        reader = Streamed(self._split, 1, one_each)
        shards, row = len(reader._counts), self.dtype.itemsize * int(np.prod(self.latent_shape))
        wanted = min(POOL_BATCHES * batch, POOL_BYTES // row)
        reader._buffer_shards = max(1, min(-(-wanted * shards // max(1, reader.rows)), shards))
        return reader

    def _batches(self, order: Order, epoch: int, step: int, ids: bool, reuse: bool) -> Iterator[Batch]:
        start, stop = order.share(self.rows)
        sizes = _sizes(stop - start, order, self.rows)
        skip = sum(sizes[:step])
        pools = list(self._pools(order, epoch, start, stop))
        while pools and skip >= pools[0].rows:  # consumed before: not read
            skip -= pools.pop(0).rows
        buffer = np.empty((order.batch, *self.latent_shape), self.dtype) if reuse else None
        stopped = Event()
        with closing(prefetched(partial(self._load, pool, order, epoch, ids, stopped) for pool in pools)) as loaded:
            tail = _Tail(self._dealt(loaded, pools, order, epoch), skip)
            try:
                for size in sizes[step:]:
                    self.own()
                    z = np.empty((size, *self.latent_shape), self.dtype) if buffer is None else buffer[:size]
                    yield tail.batch(z, ids, len(self.quantizers) > 1)
            finally:
                stopped.set()

    def _pools(self, order: Order, epoch: int, start: int, stop: int) -> Iterator[_Pool]:
        """Yield the pools of this rank's stretch of the epoch's sequence."""
        counts = self._counts
        sequence = epoch_order(len(counts), order.seed, epoch) if order.shuffle else np.arange(len(counts))
        ends = np.cumsum(counts[sequence])
        pieces = [
            (int(s), max(0, start - int(end - counts[s])), min(int(counts[s]), stop - int(end - counts[s])))
            for s, end in zip(sequence, ends, strict=True)
            if end > start and end - counts[s] < stop
        ]
        for number, first in enumerate(range(0, len(pieces), self._buffer_shards)):
            yield _Pool(number, tuple(pieces[first : first + self._buffer_shards]))

    @staticmethod
    def _dealt(
        loaded: Iterator[Batch], pools: list[_Pool], order: Order, epoch: int
    ) -> Iterator[tuple[Batch, np.ndarray]]:
        """Yield each pool's rows, and the order in which they are dealt out."""
        for pool in pools:
            sequence = np.arange(pool.rows)
            if order.shuffle:
                shuffled = np.random.default_rng([order.seed, epoch, order.rank, order.world, pool.number])
                sequence = shuffled.permutation(pool.rows)
            yield next(loaded), sequence

    def _load(self, pool: _Pool, order: Order, epoch: int, ids: bool, stopped: Event) -> Batch:
        which = np.empty(pool.rows, np.int64)
        rows = Batch(
            np.empty((pool.rows, *self.latent_shape), self.dtype),
            np.empty(pool.rows, np.int32),
            np.empty((pool.rows, 16), np.uint8) if ids else None,
            which,
        )
        filled = 0
        for number, start, stop in pool.pieces:
            if stopped.is_set():
                break  # nobody waits for these rows any more
            here = slice(filled, filled + stop - start)
            shard = self._split.shards[number]
            read = self._split.read(shard, ids)
            wanted = self._wanted(number, order, epoch)[start:stop]
            read.z.take(wanted, 0, out=rows.z[here], mode="clip")
            rows.labels[here] = read.labels[wanted]
            which[here] = self._split.quantizer_number(shard)
            if rows.ids is not None and read.ids is not None:
                rows.ids[here] = read.ids[wanted]
            filled = here.stop
            del read
        return rows

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
            starts = np.flatnonzero(np.append(True, (ids[1:] != ids[:-1]).any(1)))
            first, last = ids[0].tobytes(), ids[-1].tobytes()
            if before == (shard.fragment, shard.number - 1, first):
                starts = starts[1:]
            before = (shard.fragment, shard.number, last)
            found.append(starts.astype(np.int32))
    return found


class _Tail:
    """The rest of the current pool, dealt out batch by batch; what a batch lacks comes from the next pool."""

    def __init__(self, pools: Iterator[tuple[Batch, np.ndarray]], skip: int) -> None:
        self._pools, self._skip = pools, skip
        self._rows: Batch | None = None
        self._positions = np.empty(0, np.int64)

    def batch(self, z: np.ndarray, ids: bool, several: bool) -> Batch:
        """Return as many rows as z holds."""
        labels, which = np.empty(len(z), np.int32), np.empty(len(z), np.int64)
        names = np.empty((len(z), 16), np.uint8) if ids else None
        filled = 0
        while filled < len(z):
            if not len(self._positions):
                self._next()
            assert self._rows is not None
            positions = self._positions[: len(z) - filled]
            self._positions = self._positions[len(positions) :]
            here = slice(filled, filled + len(positions))
            self._rows.z.take(positions, 0, out=z[here], mode="clip")
            labels[here] = self._rows.labels[positions]
            if self._rows.which is not None:
                which[here] = self._rows.which[positions]
            if names is not None and self._rows.ids is not None:
                names[here] = self._rows.ids[positions]
            filled = here.stop
        return Batch(z, labels, names, which if several else None)

    def _next(self) -> None:
        self._rows = None  # before the next comes: at most two pools are in memory
        self._rows, positions = next(self._pools)
        self._positions, self._skip = positions[self._skip :], 0


def _sizes(rows: int, order: Order, total: int) -> list[int]:
    """Return the sizes of this rank's batches of an epoch of `total` rows, of which it has `rows`."""
    steps = order.steps(total)
    return [min(order.batch, rows - step * order.batch) for step in range(steps)]
