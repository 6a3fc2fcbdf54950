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
from functa.storage.functaset.fragment import committed_receipt, live_shards, read_array, visible_rows
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.header import create_functaset
from functa.storage.functaset.history import Commit, latest
from functa.storage.functaset.plan import (
    Name,
    Plan,
    ShardRows,
    load_plan,
    load_quantizer,
    plan_fragment,
    plan_rows,
    row_id,
)
from functa.storage.functaset.quantizer import Quantizer, calibrate
from functa.storage.functaset.shard import read_receipt, write_shard
from functa.storage.places.location import Location
from functa.storage.upkeep.status import bytes_left

SPLITS = ("train", "test")

CALIBRATION_BYTES = 128 << 20  # of float32 latents that set the ranges: CIFAR-10's 8x8x16 fit, larger sets are sampled


@dataclass(frozen=True)
class _Rows:
    """What the source's plans say of the visible rows of a split."""

    keys: list[str]
    labels: np.ndarray  # int32 [n]
    tokens: list[str]
    augmentations: np.ndarray  # int32 [n]

    @property
    def names(self) -> list[Name]:
        return [(row_id(key), int(number)) for key, number in zip(self.keys, self.augmentations, strict=True)]


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
    """Write `source` at config.bits into `destination`, and commit it once; what stands already is adopted.

    Ranges come from the training latents, or from as many whole shards of them as CALIBRATION_BYTES hold. Running it
    again continues; when all is done it changes nothing. `progress` is called with (rows done, rows) after each shard.
    Raises StorageError: more bits than the source has, nothing visible in it, another functaset or other files in the
    destination, damage in the source, more clipped numbers than config.max_clip_fraction.
    """
    _refuse_nonsense(source, destination, config)
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
    standing = latest(destination)
    if standing is not None and standing.fragments:
        return standing
    plans = _plans(source, destination, config, reader)
    destination.preflight_write(bytes_left(destination, plans))
    done, total = 0, sum(plan.rows for plan in plans)
    for plan in plans:
        for shard in range(plan.shards):
            _write(destination, plan, shard, reader, config.max_clip_fraction)
            done += plan.shard_size(shard)
            if progress:
                progress(done, total)
    return commit(destination, [plan.id for plan in plans])


def _refuse_nonsense(source: Functaset, destination: Location, config: QuantizationConfig) -> None:
    name = source.location.uri
    bits = max((plan.quantization.bits if plan.quantization else 32 for _, plan in source.fragments), default=32)
    if config.bits > bits:
        raise StorageError(f"{name}: has {bits} bits a number, which {config.bits} cannot better; ask for fewer")
    if not any(source.rows(split) for split in SPLITS):
        raise StorageError(f"{name}: version {source.version} shows no rows, so there is nothing to quantise; encode")
    if destination.uri == name or destination.uri.startswith(f"{name}/"):
        raise StorageError(f"{destination.uri}: lies in the functaset that it is made from; choose another place")
    ours = ("zarr.json", "fields/", "fragments/")
    if not destination.exists("zarr.json") and any(not key.startswith(ours) for key in destination.list()):
        raise StorageError(f"{destination.uri}: holds something else; choose an empty place")


def _fingerprint(source: Functaset, config: QuantizationConfig, reader: "_Reader") -> dict[str, Any]:
    """The source's, with this quantiser, and which functaset it was made from: the source may have grown since."""
    quantization = config.model_dump(mode="json", exclude={"max_clip_fraction"})
    quantization["calibration_images"] = sum(count for _, count in reader.sample)
    kept = {key: value for key, value in source.fingerprint.items() if not key.startswith("quantization.")}
    return {
        **kept,
        **{f"quantization.{key}": value for key, value in quantization.items()},
        "requantised_from": {"fingerprint": source.commit.fingerprint, "content": source.content},
    }


def _plans(source: Functaset, destination: Location, config: QuantizationConfig, reader: "_Reader") -> list[Plan]:
    """One fragment for each split. A plan that stands is the one, ranges included: the fingerprint leaves no other."""
    keys = destination.list("fragments/")
    found = [load_plan(destination, key.split("/")[1]) for key in keys if key.split("/")[2:] == ["plan.json"]]
    standing: dict[str, Plan] = {plan.split: plan for plan in found}
    quantizer = next((load_quantizer(destination, plan) for plan in found), None)
    plans = []
    for split in SPLITS:
        if not source.rows(split):
            continue
        quantizer = quantizer or calibrate(config, reader.calibration())
        plans.append(standing.get(split) or _plan(source, destination, config, reader.rows(split), quantizer, split))
    return plans


def _plan(
    source: Functaset,
    destination: Location,
    config: QuantizationConfig,
    rows: _Rows,
    quantizer: Quantizer | None,
    split: str,
) -> Plan:
    like = max((plan for _, plan in source.fragments), key=lambda plan: plan.shard_rows)  # additions are often small
    return plan_fragment(
        destination, split=split, keys=rows.keys, labels=rows.labels, tokens=rows.tokens,
        latent_shape=source.latent_shape, shard_rows=like.shard_rows, chunk_rows=like.chunk_rows, quantizer=quantizer,
        augmentations=rows.augmentations, codec=config.codec, versions=_versions(),
    )  # fmt: skip


def _write(destination: Location, plan: Plan, shard: int, reader: "_Reader", max_clip_fraction: float) -> None:
    if read_receipt(destination, plan, shard) is not None:
        return
    begun = time.monotonic()
    planned = plan_rows(destination, plan, shard)
    latents, psnr, sha256 = reader.gather(plan.split, planned)
    write_shard(
        destination, plan, shard, latents=latents, labels=planned.labels, psnr=psnr, sha256=sha256,
        good=np.ones(len(latents), bool), reasons={}, max_clip_fraction=max_clip_fraction,
        seconds=time.monotonic() - begun, versions=_versions(),
    )  # fmt: skip


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("numpy", "zarr")}


class _Reader:
    """The source's shards, verified as they are read; of each fragment the last one read stays in memory."""

    def __init__(self, source: Functaset) -> None:
        self.location = source.location
        self.shards = [
            (entry, plan, committed_receipt(source.location, entry, plan, shard))
            for entry, plan in source.fragments
            for shard in live_shards(entry, plan)
        ]
        self.visible = [np.flatnonzero(visible_rows(entry, plan, receipt)) for entry, plan, receipt in self.shards]
        self.sample = self._sample("train" if source.rows("train") else "test")
        self._numbers: dict[str, dict[Name, int]] = {}
        self._places: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._kept: dict[str, tuple[int, _Block]] = {}

    def _sample(self, split: str) -> list[tuple[int, int]]:
        """(shard, how many of its visible rows) that set the ranges: all, or the first of shards spread evenly.

        Rows lie in the order of their ids, so that the first are as good as any.
        """
        mine = [i for i, (entry, _, _) in enumerate(self.shards) if entry.split == split and len(self.visible[i])]
        rows = CALIBRATION_BYTES // (4 * self.shards[mine[0]][1].dims)
        if sum(len(self.visible[i]) for i in mine) <= rows:
            return [(i, len(self.visible[i])) for i in mine]
        count = min(len(mine), max(1, rows // max(len(self.visible[i]) for i in mine)))
        chosen = np.unique(np.linspace(0, len(mine) - 1, count).round().astype(int))
        return [(mine[i], min(len(self.visible[mine[i]]), max(1, rows // count))) for i in chosen]

    def calibration(self) -> np.ndarray:
        """Latents float32 [n, s, s, c] that set the ranges."""
        return np.concatenate([self._block(i).latents[self.visible[i][:count]] for i, count in self.sample])

    def rows(self, split: str) -> _Rows:
        """All visible rows of a split, in the order of shards."""
        keys: list[str] = []
        tokens: list[str] = []
        labels, augmentations = [], []
        for i in self._of(split):
            table = plan_rows(self.location, self.shards[i][1], self.shards[i][2].shard)
            keys += [table.keys[row] for row in self.visible[i]]
            tokens += [table.tokens[row] for row in self.visible[i]]
            labels.append(table.labels[self.visible[i]])
            augmentations.append(table.augmentations[self.visible[i]])
        return _Rows(keys, np.concatenate(labels), tokens, np.concatenate(augmentations))

    def gather(self, split: str, planned: ShardRows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same of `rows(split)` -> latents float32 [n, s, s, c], PSNR [n], sha256 uint8 [n, 32].

        By name: the source may have been repaired or erased from since it was planned, which moves its rows.
        """
        if split not in self._numbers:
            self._numbers[split] = {name: number for number, name in enumerate(self.rows(split).names)}
        known = self._numbers[split]
        names = planned.names
        gone = [key for key, name in zip(planned.keys, names, strict=True) if name not in known]
        if gone:
            raise StorageError(f"{self.location.uri}: shows '{gone[0]}' no longer; quantise into an empty place")
        rows = np.array([known[name] for name in names])
        if split not in self._places:
            mine = self._of(split)
            numbers = np.concatenate([np.full(len(self.visible[i]), i) for i in mine])
            self._places[split] = numbers, np.concatenate([self.visible[i] for i in mine])
        shards, within = (column[rows] for column in self._places[split])
        shape = self.shards[shards[0]][1].latent_shape
        latents = np.empty((len(rows), *shape), np.float32)
        psnr, sha256 = np.empty(len(rows), np.float32), np.empty((len(rows), 32), np.uint8)
        for i in np.unique(shards):
            here = shards == i
            block = self._block(int(i))
            latents[here] = block.latents[within[here]]
            psnr[here], sha256[here] = block.psnr[within[here]], block.sha256[within[here]]
        return latents, psnr, sha256

    def _of(self, split: str) -> list[int]:
        return [i for i, (entry, _, _) in enumerate(self.shards) if entry.split == split]

    def _block(self, index: int) -> _Block:
        """One shard, its rows in order. Both stores lie in the order of ids, so each is read about once."""
        entry, plan, receipt = self.shards[index]
        kept = self._kept.get(entry.fragment)
        if kept is not None and kept[0] == index:
            return kept[1]
        z, psnr, sha256 = (read_array(self.location, plan, receipt, name) for name in ("z", "psnr", "source_sha256"))
        quantizer = load_quantizer(self.location, plan)
        latents = quantizer.decode(z) if quantizer else z
        seen = self.visible[index]
        if not np.isfinite(latents[seen]).all() or np.isnan(psnr[seen]).any():
            raise DamagedObject(f"fragment {plan.id}, shard {receipt.shard}: visible rows are not whole; restore them")
        self._kept[entry.fragment] = index, _Block(latents, psnr, sha256)
        return self._kept[entry.fragment][1]
