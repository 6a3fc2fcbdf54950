"""Rows that were read and wait to be dealt out: when each one's turn comes, and their places in memory."""

import numpy as np

from functa.storage.readers.reader import Batch

JITTER = 0.5  # of the distance between the rows of an image: they keep half of it at least


def delays(rows: int, images: np.ndarray | None, random: np.random.Generator) -> np.ndarray:
    """Return by how much each row is delayed, float64 [rows], uniform in [0, 1).

    `images` are the positions at which the rows of an image begin, None if each is one of its own: the delays of an
    image's rows are in random order as far apart as can be, so that a batch has hardly any image twice.
    """
    if images is None:
        return random.random(rows)
    sizes = np.diff(images, append=rows)
    image = np.repeat(np.arange(len(images)), sizes)
    turn = np.empty(rows, np.int64)
    turn[np.lexsort((random.random(rows), image))] = np.arange(rows) - images[image]
    phase = random.random(len(images))[image]
    return (turn + phase + JITTER * random.random(rows)) / sizes[image] % 1.0


def image_starts(ids: np.ndarray) -> np.ndarray:
    """Return the positions among rows of these ids, uint8 [n, 16], at which the rows of an image begin."""
    return np.flatnonzero(np.append(True, (ids[1:] != ids[:-1]).any(1)))


class Waiting:
    """Rows in memory that were not dealt out yet, in the order of their keys. A row that leaves frees its place."""

    def __init__(self, places: int, latent_shape: tuple[int, int, int], dtype: np.dtype) -> None:
        self._z = np.empty((places, *latent_shape), dtype)
        self._labels, self._which = np.empty(places, np.int32), np.empty(places, np.int64)
        self._ids = np.empty((places, 16), np.uint8)
        self._free = np.arange(places)
        self._keys, self._places = np.empty(0), np.empty(0, np.int64)

    def add(self, rows: Batch, keys: np.ndarray) -> None:
        """Copy rows to free places; float64 [n] keys decide when they leave."""
        lacking = len(keys) - len(self._free)
        if lacking > 0:  # chance: more keys than usual are late
            self._grow(lacking)
        here, self._free = self._free[: len(keys)], self._free[len(keys) :]
        self._z[here], self._labels[here] = rows.z, rows.labels
        if rows.which is not None:
            self._which[here] = rows.which
        if rows.ids is not None:
            self._ids[here] = rows.ids
        sequence = np.argsort(keys, kind="stable")
        joined = np.concatenate([self._keys, keys[sequence]])
        merged = np.argsort(joined, kind="stable")  # of two sorted runs: linear
        self._keys, self._places = joined[merged], np.concatenate([self._places, here[sequence]])[merged]

    def ready(self, below: float) -> int:
        """Return how many rows have keys below this one."""
        return int(np.searchsorted(self._keys, below))

    def drop(self, count: int) -> np.ndarray:
        """Let the next rows leave; return where they were."""
        leaving, self._places, self._keys = self._places[:count], self._places[count:], self._keys[count:]
        self._free = np.concatenate([leaving, self._free])  # used again first: their pages are touched already
        return leaving

    def deal(self, z: np.ndarray, ids: bool, several: bool) -> Batch:
        """Return the next rows, as many as z [b, s, s, c] holds, their latents in it."""
        here = self.drop(len(z))
        self._z.take(here, 0, out=z, mode="clip")
        which = self._which[here] if several else None
        return Batch(z, self._labels[here], self._ids[here] if ids else None, which)

    def _grow(self, places: int) -> None:
        before = len(self._z)
        for name in ("_z", "_labels", "_which", "_ids"):
            array = getattr(self, name)
            setattr(self, name, np.concatenate([array, np.empty((places, *array.shape[1:]), array.dtype)]))
        self._free = np.concatenate([self._free, np.arange(before, before + places)])
