"""Rows of a split before their images are read: keys and labels, the stratified split, the limit."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from functa.storage.errors import StorageError


@dataclass(frozen=True)
class Rows:
    """Keys, labels and tokens of one split, before limits, and the index or file of each row."""

    keys: list[str]
    labels: np.ndarray
    tokens: list[str]
    origins: list[str]

    def take(self, rows: np.ndarray) -> "Rows":
        return Rows(
            [self.keys[i] for i in rows],
            self.labels[rows],
            [self.tokens[i] for i in rows],
            [self.origins[i] for i in rows],
        )


def limited(rows: Rows, limit: int | None) -> Rows:
    """Return at most `limit` rows: the first of each class, classes in turn, in their order."""
    if limit is None or len(rows.keys) <= limit:
        return rows
    turn = np.zeros(len(rows.labels), np.int64)
    for label in np.unique(rows.labels):
        mine = rows.labels == label
        turn[mine] = np.arange(mine.sum())
    return rows.take(np.sort(np.lexsort((rows.labels, turn))[:limit]))


def stratified(keys: Sequence[str], labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(train rows, test rows): of each class the share `fraction`, at least one each, chosen by a hash of the key."""
    rank = np.array([hashlib.sha256(f"{seed}\0{key}".encode()).digest()[:8] for key in keys], "S8")
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        if len(mine) < 2:
            raise StorageError(f"{keys[mine[0]]}: is alone in its class, and a split needs 2; or make train/ and test/")
        count = min(max(1, round(fraction * len(mine))), len(mine) - 1)
        held_out[mine[np.argsort(rank[mine], kind="stable")[:count]]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
