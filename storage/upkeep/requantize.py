"""A functaset's latents into another functaset at fewer bits, without the images.

What readers see of the source is what the new one holds: bad and retired rows stay behind. Keys, ids, labels, tokens,
splits, the field and the digests of the images' bytes are the source's. So is each row's PSNR: here as after encoding
it is that of the latents before quantisation, since no image is there to measure another.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from functa.storage.config import QuantizationConfig
from functa.storage.errors import DamagedObject, StorageError
from functa.storage.functaset.commit import commit
from functa.storage.functaset.fragment import Fragment
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.header import create_functaset
from functa.storage.functaset.history import Commit, latest
from functa.storage.functaset.plan import SPLITS, Name, RowTable
from functa.storage.functaset.planning import plan_fragment
from functa.storage.functaset.quantizer import calibrate
from functa.storage.functaset.shards.shard import Shard
from functa.storage.functaset.shards.writing import write_shard
from functa.storage.places.location import Location
from functa.storage.upkeep.status import bytes_left

CALIBRATION_BYTES = 128 << 20  # of float32 latents that set the ranges: CIFAR-10's 8x8x16 fit, larger sets are sampled


@dataclass(frozen=True)
class _Block:
    """One shard of the source: latents float32 [n, s, s, c], PSNR [n] and sha256 uint8 [n, 32] of all its rows."""

    latents: np.ndarray
    psnr: np.ndarray
    sha256: np.ndarray


def requantize(
    source: Functaset,
    destination: Location,
    config: QuantizationConfig,
    progress: Callable[[int, int], None] | None = None,
) -> Commit:
    """Write `source` at config.bits into `destination`, and commit it once; what exists already is adopted.

    Ranges come from the training latents, or from as many whole shards of them as CALIBRATION_BYTES hold. Running it
    again continues; when all is done it changes nothing. `progress` is called with (rows done, rows) after each shard.
    Raises StorageError: more bits than the source has, nothing visible in it, another functaset or other files in the
    destination, damage in the source, more clipped numbers than config.max_clip_fraction.
    """
    _check(source, destination, config)
    destination.preflight_write()
    reader = _Reader(source)
    fields, described, digest = source.field()
    create_functaset(
        destination,
        fingerprint=_fingerprint(source, config, reader),
        field=fields,
        field_config=described,
        field_digest=digest,
    )
    existing = latest(destination)
    if existing is not None and existing.fragments:
        return existing
    fragments = _planned(source, destination, config, reader)
    destination.preflight_write(bytes_left(destination, fragments))
    done, total = 0, sum(fragment.plan.rows for fragment in fragments)
    for shard in (shard for fragment in fragments for shard in fragment.shards):
        _write(shard, reader, config.max_clip_fraction)
        done += shard.size
        if progress:
            progress(done, total)
    return commit(destination, [fragment.id for fragment in fragments])


def _check(source: Functaset, destination: Location, config: QuantizationConfig) -> None:
    name = source.location.uri
    bits = max((fragment.plan.bits for fragment in source.fragments), default=32)
    if config.bits > bits:
        raise StorageError(f"{name}: has {bits} bits a number, which {config.bits} cannot better; ask for fewer")
    if not any(source.rows(split) for split in SPLITS):
        raise StorageError(f"{name}: version {source.version} shows no rows, so there is nothing to quantise; encode")
    if destination.uri == name or destination.uri.startswith(f"{name}/"):
        raise StorageError(f"{destination.uri}: lies in the functaset that it is made from; choose another location")
    ours = ("zarr.json", "fields/", "fragments/")
    if not destination.exists("zarr.json") and any(not key.startswith(ours) for key in destination.list()):
        raise StorageError(f"{destination.uri}: holds something else; choose an empty location")


def _fingerprint(source: Functaset, config: QuantizationConfig, reader: "_Reader") -> dict[str, Any]:
    """Return the source's with this quantiser, and which content it was made from: the source may have grown since."""
    quantization = config.model_dump(mode="json", exclude={"max_clip_fraction"})
    quantization["calibration_images"] = sum(count for _, count in reader.sample)
    kept = {key: value for key, value in source.fingerprint.items() if not key.startswith("quantization.")}
    return {
        **kept,
        **{f"quantization.{key}": value for key, value in quantization.items()},
        "requantised_from": {"fingerprint": source.commit.fingerprint, "content": source.content},
    }


def _planned(source: Functaset, destination: Location, config: QuantizationConfig, reader: "_Reader") -> list[Fragment]:
    """Return a fragment for each split. An existing plan is adopted, ranges included: the fingerprint fixes them."""
    keys = (key.split("/") for key in destination.list("fragments/"))
    found = [Fragment.load(destination, name) for _, name, *below in keys if below == ["plan.json"]]
    existing = {fragment.split: fragment for fragment in found}
    quantizer = next((fragment.quantizer for fragment in found), None)
    like = max(
        (fragment.plan for fragment in source.fragments), key=lambda plan: plan.shard_rows
    )  # additions are small
    for split in SPLITS:
        if source.rows(split) and split not in existing:
            quantizer = quantizer or calibrate(config, reader.calibration())
            existing[split] = plan_fragment(
                destination, reader.rows(split), split=split, latent_shape=source.latent_shape,
                shard_rows=like.shard_rows, chunk_rows=like.chunk_rows, quantizer=quantizer, codec=config.codec,
                versions=_versions(),
            )  # fmt: skip
    return [existing[split] for split in SPLITS if split in existing and source.rows(split)]


def _write(shard: Shard, reader: "_Reader", max_clip_fraction: float) -> None:
    if shard.find_receipt() is not None:
        return
    begun = time.monotonic()
    latents, psnr, sha256 = reader.gather(shard.fragment.split, shard.table())
    write_shard(
        shard, latents=latents, psnr=psnr, sha256=sha256, max_clip_fraction=max_clip_fraction,
        seconds=time.monotonic() - begun, versions=_versions(),
    )  # fmt: skip


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("numpy", "zarr")}


class _Reader:
    """The source's shards, verified as they are read; of each fragment the last one read stays in memory."""

    def __init__(self, source: Functaset) -> None:
        self.uri = source.location.uri
        self.shards = source.shards()
        self.visible = [shard.rows for shard in self.shards]
        self.sample = self._sample("train" if source.rows("train") else "test")
        self._numbers: dict[str, dict[Name, int]] = {}
        self._positions: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._kept: dict[Fragment, tuple[int, _Block]] = {}

    def _sample(self, split: str) -> list[tuple[int, int]]:
        """Return (shard, how many of its visible rows) that set the ranges: all, or the first of shards spread evenly.

        Rows lie in the order of their ids, so that the first are as good as any.
        """
        mine = [i for i in self._of(split) if len(self.visible[i])]
        rows = CALIBRATION_BYTES // (4 * self.shards[mine[0]].fragment.plan.dims)
        if sum(len(self.visible[i]) for i in mine) <= rows:
            return [(i, len(self.visible[i])) for i in mine]
        count = min(len(mine), max(1, rows // max(len(self.visible[i]) for i in mine)))
        chosen = np.unique(np.linspace(0, len(mine) - 1, count).round().astype(int))
        return [(mine[i], min(len(self.visible[mine[i]]), max(1, rows // count))) for i in chosen]

    def calibration(self) -> np.ndarray:
        """Read the latents float32 [n, s, s, c] that set the ranges."""
        return np.concatenate([self._block(i).latents[self.visible[i][:count]] for i, count in self.sample])

    def rows(self, split: str) -> RowTable:
        """Read the table of all visible rows of a split, in the order of shards."""
        return RowTable.join([self.shards[i].table().take(self.visible[i]) for i in self._of(split)])

    def gather(self, split: str, planned: RowTable) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Read the same of `rows(split)`: latents float32 [n, s, s, c], PSNR [n], sha256 uint8 [n, 32].

        By name: the source may have been repaired or erased from since it was planned, which moves its rows.
        """
        if split not in self._numbers:
            self._numbers[split] = {name: number for number, name in enumerate(self.rows(split).names)}
            mine = self._of(split)
            numbers = np.concatenate([np.full(len(self.visible[i]), i) for i in mine])
            self._positions[split] = numbers, np.concatenate([self.visible[i] for i in mine])
        known = self._numbers[split]
        names = planned.names
        missing = [key for key, name in zip(planned.keys, names, strict=True) if name not in known]
        if missing:
            raise StorageError(f"{self.uri}: shows '{missing[0]}' no longer; quantise into an empty location")
        rows = np.array([known[name] for name in names])
        shards, within = (column[rows] for column in self._positions[split])
        latents = np.empty((len(rows), *self.shards[shards[0]].fragment.plan.latent_shape), np.float32)
        psnr, sha256 = np.empty(len(rows), np.float32), np.empty((len(rows), 32), np.uint8)
        for i in np.unique(shards):
            here = shards == i
            block = self._block(int(i))
            latents[here] = block.latents[within[here]]
            psnr[here], sha256[here] = block.psnr[within[here]], block.sha256[within[here]]
        return latents, psnr, sha256

    def _of(self, split: str) -> list[int]:
        return [i for i, shard in enumerate(self.shards) if shard.fragment.split == split]

    def _block(self, index: int) -> _Block:
        """Read one shard, its rows in order. Both stores lie in the order of ids, so each is read about once."""
        shard = self.shards[index]
        kept = self._kept.get(shard.fragment)
        if kept is not None and kept[0] == index:
            return kept[1]
        z, psnr, sha256 = (shard.array(name) for name in ("z", "psnr", "source_sha256"))
        latents, seen = shard.fragment.dequantized(z), self.visible[index]
        if not np.isfinite(latents[seen]).all() or np.isnan(psnr[seen]).any():
            raise DamagedObject(f"{shard.name}: visible rows are not whole; restore it from a copy")
        self._kept[shard.fragment] = index, _Block(latents, psnr, sha256)
        return self._kept[shard.fragment][1]
