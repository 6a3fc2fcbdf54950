"""A split's shards for readers: the rows that show, how they are coded, and their bytes, checked."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np

from functa.storage.errors import DamagedObject
from functa.storage.functaset.fragment import Fragment
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.quantizer import Quantizer
from functa.storage.functaset.shards.shard import Shard
from functa.storage.places.side_by_side import side_by_side
from functa.storage.readers.reader import Batch

COLUMN_BYTES = 24  # label, id and quantiser beside a row's latent


class SplitShards:
    """The shards of a split that have rows to show, in the order of the store. Raises StorageError if it has none.

    quantizers: the different ones of the split; empty where rows are float32, or shown as such because fragments of
    codes lie beside fragments of float32. counts int64 [shards]: rows of each. plain: only rows of images as they are,
    not those of their augmentations; known: how many of them each of the functaset's shards has, so that a shard is
    opened only when it is read. augmented: images have several rows.
    """

    def __init__(
        self, functaset: Functaset, split: str, plain: bool = False, known: Sequence[int] | None = None
    ) -> None:
        functaset.own()
        self.name = f"{functaset.location.uri}, version {functaset.version}, split '{split}'"
        self.location = functaset.location
        self.latent_shape = functaset.latent_shape
        self.augmented = "augmentation.count" in functaset.fingerprint and not plain
        found = functaset.shards(split)
        fragments = list(dict.fromkeys(shard.fragment for shard in found))
        for fragment in fragments:
            if fragment.plan.latent_shape != self.latent_shape:
                raise DamagedObject(f"{fragment.name}: latents {fragment.plan.latent_shape} beside {self.latent_shape}")
        kinds, numbers = _distinct([fragment.quantizer for fragment in fragments])
        self.mixed = 0 < sum(fragment.quantizer is not None for fragment in fragments) < len(fragments)
        self.quantizers = [] if self.mixed else kinds
        self._numbers = dict(zip(fragments, numbers, strict=True))
        self._unopened = known is not None
        if known is None:
            chosen = list(side_by_side(self.location, plain_rows, found)) if plain else found
            known = [shard.count for shard in chosen]
        else:
            chosen = found
        self.shards = [shard for shard, count in zip(chosen, known, strict=True) if count]
        self.counts = np.array([count for count in known if count], np.int64)

    def by_fragment(self) -> list[tuple[Fragment, list[Shard]]]:
        """Return the fragments with their shards."""
        groups = groupby(self.shards, key=lambda shard: shard.fragment)
        return [(fragment, list(shards)) for fragment, shards in groups]

    @property
    def rows(self) -> int:
        """Number of rows to show."""
        return int(self.counts.sum())

    @property
    def dtype(self) -> np.dtype:
        """Type of `z` as it is read: uint8 codes or float32."""
        return np.dtype(np.uint8 if self.quantizers else np.float32)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in memory."""
        return int(np.prod(self.latent_shape)) * self.dtype.itemsize + COLUMN_BYTES

    def quantizer_number(self, shard: Shard) -> int:
        """Return the number of a shard's quantiser among `quantizers`."""
        return self._numbers[shard.fragment]

    def read(self, shard: Shard, ids: bool) -> Batch:
        """Read a shard's rows; every object's length and sha256 is checked. Raises MissingObject or DamagedObject."""
        columns = (plain_rows(shard) if self._unopened else shard).columns("label", "z", *(["id"] if ids else []))
        z = shard.fragment.dequantized(columns["z"]) if self.mixed else columns["z"]
        which = np.full(len(z), self.quantizer_number(shard), np.int64)
        return Batch(z, columns["label"], columns.get("id"), which)


def plain_rows(shard: Shard) -> Shard:
    """Return the shard without the rows of augmentations."""
    rows = shard.rows
    chosen = rows[shard.array("augmentation")[rows] == 0]
    return shard if len(chosen) == len(rows) else replace(shard, chosen=chosen)


def _distinct(quantizers: Sequence[Quantizer | None]) -> tuple[list[Quantizer], list[int]]:
    """Return the different ones among quantisers, and for each given one which it is (0 for None)."""
    found: dict[tuple[bytes, bytes, tuple[int, ...]], int] = {}
    kept: list[Quantizer] = []
    numbers = []
    for quantizer in quantizers:
        if quantizer is None:
            numbers.append(0)
            continue
        key = (quantizer.low.tobytes(), quantizer.step.tobytes(), quantizer.low.shape)
        if key not in found:
            found[key] = len(kept)
            kept.append(quantizer)
        numbers.append(found[key])
    return kept, numbers
