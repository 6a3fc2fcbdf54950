"""The shuffle order of readers: which row comes when in an epoch, and on which rank, by (seed, epoch) alone.

Trainings whose latents fit into memory draw by models/compute/batch_order.py instead.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Order:
    """The dealing of an epoch's rows: `batch` rows a step to each of `world` ranks, in an order of (seed, epoch).

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
        """Return the steps of an epoch of so many rows, the same on every rank."""
        whole, rest = divmod(rows, self.batch * self.world)
        return whole + (rest > 0 and not self.drop_last)

    def part(self, rows: int, step: int) -> slice:
        """Return this rank's positions of a step in the epoch's sequence; the ranks' batches lie side by side."""
        start = step * self.batch * self.world
        rest = min(rows - start, self.batch * self.world)
        return slice(start + self._cut(rest, self.rank), start + self._cut(rest, self.rank + 1))

    def share(self, rows: int) -> tuple[int, int]:
        """Return this rank's positions of the whole epoch as one stretch (start, stop), to be read shard by shard."""
        whole, rest = divmod(rows, self.batch * self.world)
        if self.drop_last:
            rest = 0
        start, stop = (whole * self.batch * r + self._cut(rest, r) for r in (self.rank, self.rank + 1))
        return start, stop

    def _cut(self, rows: int, rank: int) -> int:
        """Return where a rank's part of so many rows begins."""
        return rows * rank // self.world


@lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Return a permutation of n rows, a function of (seed, epoch) alone, int64 [n], read-only."""
    order = np.random.default_rng([seed, epoch]).permutation(n)
    order.flags.writeable = False
    return order
