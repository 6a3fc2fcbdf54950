"""Rows of a split before their images are read: keys and labels, the stratified split, the limit."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from functa.storage.errors import StorageError
from functa.storage.texts import encoded, taken

if TYPE_CHECKING:
    from functa.storage.config import ImagesConfig


SEEDS, HASHES = 100, 1_000_000  # that are tried to split few images


@dataclass(frozen=True)
class Rows:
    """Keys, labels and tokens of one split, before limits, and the index or file of each row."""

    keys: Sequence[str]
    labels: np.ndarray
    tokens: Sequence[str]
    origins: Sequence[str]

    def take(self, rows: np.ndarray) -> "Rows":
        """Return these rows, in this order."""
        keys = taken(self.keys, rows)
        origins = keys if self.origins is self.keys else taken(self.origins, rows)
        return Rows(keys, self.labels[rows], taken(self.tokens, rows), origins)


def limited(rows: Rows, limit: int | None) -> Rows:
    """Return at most `limit` rows: the first of each class, classes in turn, in their order."""
    if limit is None or len(rows.keys) <= limit:
        return rows
    order = np.argsort(rows.labels, kind="stable")
    _, counts = np.unique(rows.labels, return_counts=True)
    turn = np.empty(len(rows.labels), np.int64)
    turn[order] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
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
    limit = math.ceil(fraction * 2**64)
    return _hashes(keys, seed) < limit if limit < 2**64 else np.ones(len(keys), bool)


def _hashes(keys: Sequence[str], seed: int) -> np.ndarray:
    """Return the first 8 bytes of each key's sha256 with the seed, as numbers uint64 [n]."""
    begun = hashlib.sha256(f"{seed}\0".encode())

    def digest(data: bytes) -> bytes:
        hashed = begun.copy()
        hashed.update(data)
        return hashed.digest()[:8]

    found: np.ndarray = np.frombuffer(b"".join(map(digest, encoded(keys))), ">u8").astype(np.uint64)
    return found


def stratified(keys: Sequence[str], labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(train rows, test rows): of each class the share `fraction`, at least one each, chosen by a hash of the key."""
    order = np.lexsort((_hashes(keys, seed), labels))  # class by class, by hash in each
    _, first, of, counts = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
    if (counts < 2).any():
        alone = keys[int(first[counts < 2][0])]
        raise StorageError(f"{alone}: is alone in its class, and a split needs 2; or make train/ and test/")
    held = np.minimum(np.maximum(1, np.round(fraction * counts)), counts - 1)
    place = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)  # in its class
    held_out = np.zeros(len(labels), bool)
    held_out[order] = place < held[of[order]]
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
