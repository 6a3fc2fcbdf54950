"""Where a training run's randomness comes from: seeds of several numbers, and the order in which rows are seen."""

from functools import lru_cache

import numpy as np


def mix(*numbers: int) -> int:
    """A 63-bit seed of several integers: SplitMix64's finaliser over a running sum; no hash() of Python's."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 1


def stage_number(stage: str) -> int:
    """Stages of one seed draw from different streams."""
    return int.from_bytes(stage.encode()[:7], "big")


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
