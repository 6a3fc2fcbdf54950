"""Rows of a split before their images are read: keys and labels, the stratified split, the limit."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from functa.storage.errors import StorageError

if TYPE_CHECKING:
    from functa.storage.config import ImagesConfig


SEEDS, HASHES = 100, 1_000_000  # that are tried to split few images


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


def split_rows(rows: Rows, config: "ImagesConfig") -> tuple[Rows, Rows]:
    """Return training and test rows of a source without splits of its own. Raises StorageError if one has no image."""
    if config.split == "stratified":
        train, test = stratified(rows.keys, rows.labels, config.test_fraction, config.split_seed)
        return rows.take(train), rows.take(test)
    held_out = by_key(rows.keys, config.test_fraction, config.split_seed)
    if fault := _fault(rows.labels, held_out):
        name = config.location or config.source
        raise StorageError(f"{name}, of its {len(rows.keys)} images: {fault}; {_fix(rows, config)}")
    return rows.take(np.flatnonzero(~held_out)), rows.take(np.flatnonzero(held_out))


def _fault(labels: np.ndarray, held_out: np.ndarray) -> str:
    """Return why images cannot be split so: no test image, or a class that no model could know."""
    if not held_out.any():
        return "by their names none is a test image"
    unseen = np.setdiff1d(labels, labels[~held_out])
    return f"by their names all images of {len(unseen)} classes are test images" if len(unseen) else ""


def _fix(rows: Rows, config: "ImagesConfig") -> str:
    """Return what to do: the first seed that splits the images, where there are few enough to try some."""
    for seed in range(min(SEEDS, HASHES // len(rows.keys))):
        held_out = by_key(rows.keys, config.test_fraction, seed)
        if not _fault(rows.labels, held_out):
            return f"set images.split_seed={seed}, which holds out {held_out.sum()}, or make train/ and test/"
    return "add images to small classes, set images.split=stratified, or make train/ and test/"


def by_key(keys: Sequence[str], fraction: float, seed: int) -> np.ndarray:
    """Return bool [n]: whether an image is a test image, by a hash of its key alone.

    So it stays what it is, whatever other images are added, deleted or renamed: a model that trained on it is never
    tested on it.
    """
    return np.array([int.from_bytes(_hash(key, seed), "big") < fraction * 2**64 for key in keys], bool)


def _hash(key: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\0{key}".encode()).digest()[:8]


def stratified(keys: Sequence[str], labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(train rows, test rows): of each class the share `fraction`, at least one each, chosen by a hash of the key."""
    rank = np.array([_hash(key, seed) for key in keys], "S8")
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        if len(mine) < 2:
            raise StorageError(f"{keys[mine[0]]}: is alone in its class, and a split needs 2; or make train/ and test/")
        count = min(max(1, round(fraction * len(mine))), len(mine) - 1)
        held_out[mine[np.argsort(rank[mine], kind="stable")[:count]]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
