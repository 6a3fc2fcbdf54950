"""Mean and variance of latents per element, mergeable: what App. C.4.1's statistics need, without a second pass."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

BLOCK_ROWS = 256

COLUMNS = 512  # numbers of each row that are summed at once: they stay in a core's cache


@dataclass(frozen=True)
class Moments:
    """Mean and population variance of `count` latents, float64 [s, s, c]."""

    count: int
    mean: np.ndarray
    var: np.ndarray

    def to_bytes(self) -> bytes:
        """Return mean and sum of squared deviations, little-endian float64 [2, s, s, c]."""
        return np.stack([self.mean, self.var * self.count]).astype("<f8").tobytes()

    @classmethod
    def from_bytes(cls, data: bytes, count: int, latent_shape: tuple[int, int, int]) -> "Moments":
        """The inverse of to_bytes. Raises ValueError on another length."""
        mean, squares = np.frombuffer(data, "<f8").reshape(2, *latent_shape)
        return cls(count, mean, squares / max(count, 1))


def moments_of(latents: np.ndarray) -> Moments:
    """Return the moments of latents [n, s, s, c]; n may be 0."""
    if len(latents) == 0:
        zeros = np.zeros(latents.shape[1:])
        return Moments(0, zeros, zeros)
    rows = latents.reshape(len(latents), -1)
    mean, squares = np.zeros(rows.shape[1]), np.zeros(rows.shape[1])
    for first in range(0, rows.shape[1], COLUMNS):
        part = slice(first, first + COLUMNS)
        # A few rows at a time: float64 copies of a whole shard would take longer to make than all the sums.
        blocks = [rows[start : start + BLOCK_ROWS, part] for start in range(0, len(rows), BLOCK_ROWS)]
        for block in blocks:
            mean[part] += block.sum(0, dtype=np.float64)
        mean[part] /= len(rows)
        for block in blocks:
            difference = block - mean[part]
            squares[part] += np.einsum("nd,nd->d", difference, difference)
    shape = latents.shape[1:]
    return Moments(len(latents), mean.reshape(shape), squares.reshape(shape) / len(latents))


class Merging:
    """Moments of parts that come one after the other (Chan, Golub and LeVeque 1979)."""

    def __init__(self, latent_shape: tuple[int, int, int]) -> None:
        self.count, self.mean, self.squares = 0, np.zeros(latent_shape), np.zeros(latent_shape)

    def add(self, part: Moments) -> None:
        """Take the next part."""
        if part.count == 0:
            return
        total = self.count + part.count
        difference = part.mean - self.mean
        self.squares = self.squares + part.var * part.count + difference**2 * (self.count * part.count / total)
        self.mean = self.mean + difference * (part.count / total)
        self.count = total

    @property
    def moments(self) -> Moments:
        """The moments of all parts so far."""
        return Moments(self.count, self.mean, self.squares / max(self.count, 1))


def merge(parts: Iterable[Moments], latent_shape: tuple[int, int, int]) -> Moments:
    """Return the moments of all parts together, merged in the order given."""
    merging = Merging(latent_shape)
    for part in parts:
        merging.add(part)
    return merging.moments
