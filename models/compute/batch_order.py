"""The shuffle order of training batches: which rows a step sees, as a function of seed and step alone.

A training that streams its functaset has an order of its own: storage/readers/order.py.
"""

from functools import lru_cache

import numpy as np

from functa.models.compute.randomness import mix


def batch_rows(rows: int, batch: int, seed: int, step: int) -> np.ndarray:
    """The step's rows: epochs of a fresh permutation each, cut into batches that may span two epochs."""
    wanted = np.arange(step * batch, (step + 1) * batch)
    epochs, places = np.divmod(wanted, rows)
    chosen = np.empty(batch, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        chosen[here] = _order(rows, seed, int(epoch))[places[here]]
    return chosen


@lru_cache(maxsize=2)
def _order(rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(mix(seed, epoch))).permutation(rows)
