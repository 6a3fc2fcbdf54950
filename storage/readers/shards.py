"""A split's shards as readers see them: which of their rows show, how these are coded, and their bytes, checked."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from functa.storage.errors import DamagedObject, StorageError
from functa.storage.functaset.fragment import (
    Shard,
    committed_receipt,
    live_shards,
    read_array,
    visible_rows,
)
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.history import CommittedFragment
from functa.storage.functaset.plan import Plan, array_document, array_specs, load_quantizer
from functa.storage.functaset.quantizer import Quantizer
from functa.storage.readers.reader import distinct


@dataclass(frozen=True)
class Rows:
    """Visible rows of a shard, or of several: z, labels, ids and quantiser numbers as in Batch."""

    z: np.ndarray
    labels: np.ndarray
    ids: np.ndarray | None
    which: np.ndarray


class SplitShards:
    """The shards of a split that have rows to show, in the order of the store. Raises StorageError if it has none.

    plain: only rows of images as they are, not those of their augmentations.
    """

    def __init__(self, functaset: Functaset, split: str, plain: bool = False) -> None:
        functaset.own()
        self.name = f"{functaset.location.uri}, version {functaset.version}, split '{split}'"
        self.location = functaset.location
        self.latent_shape = functaset.latent_shape
        chosen = [(entry, plan) for entry, plan in functaset.fragments if entry.split == split]
        if not chosen:
            raise StorageError(f"{functaset.location.uri}: version {functaset.version} has no rows of split '{split}'")
        for _, plan in chosen:
            if plan.latent_shape != self.latent_shape:
                raise DamagedObject(f"fragment {plan.id}: latents {plan.latent_shape} beside {self.latent_shape}")
        quantizers = [load_quantizer(self.location, plan) for _, plan in chosen]
        kinds, numbers = distinct(quantizers)
        # Fragments of codes beside fragments of float32: all rows are shown as float32.
        self.quantizers = kinds if all(quantizers) else []
        self.shards = [
            shard
            for (entry, plan), quantizer, which in zip(chosen, quantizers, numbers, strict=True)
            for number in live_shards(entry, plan)
            if (shard := self._shard(entry, plan, number, quantizer, which, plain)).rows
        ]
        self.counts = np.array([shard.rows for shard in self.shards], np.int64)

    def _shard(
        self, entry: CommittedFragment, plan: Plan, number: int, quantizer: Quantizer | None, which: int, plain: bool
    ) -> Shard:
        receipt = committed_receipt(self.location, entry, plan, number)
        rows = int(visible_rows(entry, plan, receipt).sum())
        shard = Shard(self.location, entry, plan, receipt, rows, which, quantizer)
        if not plain:
            return shard
        augmentation = self._array(shard, "augmentation")
        chosen = shard.places[augmentation[shard.places] == 0]
        return shard if len(chosen) == rows else replace(shard, rows=len(chosen), chosen=chosen)

    @property
    def rows(self) -> int:
        """Visible rows."""
        return int(self.counts.sum())

    @property
    def dtype(self) -> np.dtype:
        """Of Rows.z."""
        return np.dtype(np.uint8 if self.quantizers else np.float32)

    def read(self, shard: Shard, ids: bool) -> Rows:
        """A shard's visible rows; every object's length and sha256 is checked. Raises MissingObject, DamagedObject."""
        places = shard.places

        def array(name: str) -> np.ndarray:
            found = self._array(shard, name)
            return found if len(places) == len(found) else found[places]

        labels, augmentation, z = array("label"), array("augmentation"), array("z")
        check_rows(shard.name, z, augmentation)
        if shard.quantizer is not None and not self.quantizers:
            z = shard.quantizer.decode(z)
        return Rows(z, labels, array("id") if ids else None, np.full(len(places), shard.which, np.int64))

    def columns(self, shard: Shard) -> dict[str, np.ndarray]:
        """label int32 [n] and id uint8 [n, 16] of a shard's visible rows, checked like read."""
        places = shard.places
        check_rows(shard.name, np.zeros(0), self._array(shard, "augmentation")[places])
        return {name: self._array(shard, name)[places] for name in ("label", "id")}

    def _array(self, shard: Shard, name: str) -> np.ndarray:
        document = self._document(shard.plan, name)
        return read_array(self.location, shard.plan, shard.receipt, name, document)

    @cached_property
    def _documents(self) -> dict[tuple[str, str], bytes]:
        return {}

    def _document(self, plan: Plan, name: str) -> bytes:
        """Read once a fragment: over a network every shard would ask for it again."""
        if (plan.id, name) not in self._documents:
            self._documents[plan.id, name] = array_document(self.location, plan, name, array_specs(plan)[name])
        return self._documents[plan.id, name]


def check_rows(name: str, z: np.ndarray, augmentation: np.ndarray) -> None:
    """What a receipt forged together with its objects could still get wrong. Raises DamagedObject."""
    if (z.dtype.kind == "f" and not np.isfinite(z).all()) or (augmentation < 0).any():
        raise DamagedObject(f"{name}: visible rows are not finite; restore from a copy")
