"""Reading a functaset: only what was committed, every byte checked, never a fill value."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from functa.storage.errors import DamagedObject, StorageError
from functa.storage.functaset.fragment import (
    committed_plan,
    committed_receipt,
    live_shards,
    read_array,
    retired_rows,
    visible_rows,
)
from functa.storage.functaset.header import FieldRecord, read_root
from functa.storage.functaset.history import Commit, CommittedFragment, latest, load_commit
from functa.storage.functaset.moments import Moments
from functa.storage.functaset.plan import Plan, load_quantizer, plan_rows
from functa.storage.functaset.quantizer import Quantizer
from functa.storage.functaset.records import digest, read_vouched, unseal
from functa.storage.functaset.shard import BINS_PER_DB, IDENTITY, Receipt, content_of, sum_of_contents
from functa.storage.places.address import open_location
from functa.storage.places.location import Location, refuse_fork

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Latents:
    """Rows of a split in memory, in the store's order (not the source's: go by `ids` or `keys`).

    codes uint8 [n, s, s, c] or z float32 [n, s, s, c], the other is None; labels int32 [n]; ids uint8 [n, 16];
    psnr float32 [n] in dB; augmentation int32 [n]; source_rows int64 [n], the rows of what was planned.
    """

    codes: np.ndarray | None
    z: np.ndarray | None
    labels: np.ndarray
    ids: np.ndarray
    psnr: np.ndarray
    augmentation: np.ndarray
    parts: list[tuple[slice, Quantizer | None]]  # rows of each fragment and how to dequantise them
    names: Callable[[], tuple[list[str], np.ndarray]]

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def _named(self) -> tuple[list[str], np.ndarray]:
        return self.names()

    @property
    def keys(self) -> list[str]:
        """The images' stable keys; read at first use."""
        return self._named[0]

    @property
    def source_rows(self) -> np.ndarray:
        """int64 [n]: each one's row in the sequence that its fragment was planned from; read at first use."""
        return self._named[1]

    def dequantized(self, rows: np.ndarray | None = None) -> np.ndarray:
        """float32 [n, s, s, c] of the rows asked for, or of all."""
        wanted = np.arange(len(self)) if rows is None else np.asarray(rows)
        if self.codes is None:
            assert self.z is not None
            return self.z if rows is None else self.z[wanted]
        z = np.empty((len(wanted), *self.codes.shape[1:]), np.float32)
        for part, quantizer in self.parts:
            mine = (wanted >= part.start) & (wanted < part.stop)
            assert quantizer is not None
            z[mine] = quantizer.decode(self.codes[wanted[mine]])
        return z


class Functaset:
    """A committed version of a functaset. Functaset.open; every method raises StorageError naming what is damaged."""

    def __init__(self, location: Location, commit: Commit, fingerprint: dict[str, Any], field: str) -> None:
        self.location, self.commit, self.fingerprint, self.field_digest = location, commit, fingerprint, field
        self._process = os.getpid()

    @classmethod
    def open(cls, place: str | Location, version: int | None = None) -> "Functaset":
        """The newest version, or an older one. Raises StorageError: none there, nothing committed, altered."""
        location = open_location(place) if isinstance(place, str) else place
        root = read_root(location)
        commit = latest(location) if version is None else load_commit(location, version)
        if commit is None:
            raise StorageError(f"{location.uri}: nothing is committed yet; finish encoding first")
        if commit.fingerprint != root.fingerprint_digest:
            raise DamagedObject(f"{location.uri}/zarr.json: is not the one that was committed; restore it from a copy")
        read_vouched(location, "zarr.json", commit.objects["zarr.json"])
        return cls(location, commit, root.fingerprint, root.field)

    def own(self) -> None:
        """Raises StorageError in a process that was forked after the functaset was opened."""
        refuse_fork(self._process, self.location.uri)

    @property
    def version(self) -> int:
        """Number of the commit."""
        return self.commit.version

    @cached_property
    def fragments(self) -> list[tuple[CommittedFragment, Plan]]:
        """Visible fragments with their plans, in the order of their commits."""
        self.own()
        return [(entry, committed_plan(self.location, entry)) for entry in self.commit.fragments]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(s, s, c). Raises StorageError where nothing is shown."""
        if not self.fragments:
            raise StorageError(f"{self.location.uri}: version {self.version} shows no rows")
        return self.fragments[0][1].latent_shape

    def quantizer(self, fragment: str) -> Quantizer | None:
        """A fragment's quantiser, None for float32."""
        plan = next(plan for entry, plan in self.fragments if entry.fragment == fragment)
        return load_quantizer(self.location, plan)

    @cached_property
    def _receipts(self) -> list[tuple[CommittedFragment, Plan, Receipt]]:
        return [
            (entry, plan, committed_receipt(self.location, entry, plan, shard))
            for entry, plan in self.fragments
            for shard in live_shards(entry, plan)
        ]

    @cached_property
    def content(self) -> str:
        """Digest of which images are encoded by which choices: the same wherever, whenever and in whatever shards.

        Over the fingerprint and the visible rows' ids, labels and source bytes. Not over fragments, whose ids follow
        the sources' file times and the quantiser's last bits, and which a repair makes anew.
        """
        contents = []
        for entry, plan, receipt in self._receipts:
            content = receipt.content
            if retired_rows(entry, plan, receipt.shard).any():
                visible = visible_rows(entry, plan, receipt)
                columns = {name: read_array(self.location, plan, receipt, name)[visible] for name in IDENTITY}
                content = content_of(entry.split, columns)
            contents.append(content)
        return digest({"fingerprint": self.commit.fingerprint, "rows": sum_of_contents(contents)})

    def rows(self, split: str) -> int:
        """Visible rows of a split."""
        return sum(entry.rows for entry in self.commit.fragments if entry.split == split)

    def load(self, split: str) -> Latents:
        """All visible rows of a split in memory; every object's length and sha256 is checked on the way."""
        self.own()
        chosen = [(entry, plan) for entry, plan in self.fragments if entry.split == split]
        if not chosen:
            raise StorageError(f"{self.location.uri}: version {self.version} has no rows of split '{split}'")
        columns: dict[str, list[np.ndarray]] = {name: [] for name in ("z", "label", "id", "psnr", "augmentation")}
        masks: list[tuple[Plan, int, np.ndarray]] = []
        parts: list[tuple[slice, Quantizer | None]] = []
        count = 0
        for entry, plan in chosen:
            start = count
            for shard in live_shards(entry, plan):
                receipt = committed_receipt(self.location, entry, plan, shard)
                visible = visible_rows(entry, plan, receipt)
                for name, column in columns.items():
                    column.append(read_array(self.location, plan, receipt, name)[visible])
                self._check_rows(plan, shard, columns)
                masks.append((plan, shard, visible))
                count += int(visible.sum())
            parts.append((slice(start, count), load_quantizer(self.location, plan)))
        return self._latents(columns, masks, parts)

    def _check_rows(self, plan: Plan, shard: int, columns: dict[str, list[np.ndarray]]) -> None:
        """What a receipt forged together with its objects could still get wrong."""
        z = columns["z"][-1]
        if (z.dtype.kind == "f" and not np.isfinite(z).all()) or (columns["augmentation"][-1] < 0).any():
            raise DamagedObject(f"fragment {plan.id}, shard {shard}: visible rows are not finite; restore from a copy")

    def _latents(
        self,
        columns: dict[str, list[np.ndarray]],
        masks: list[tuple[Plan, int, np.ndarray]],
        parts: list[tuple[slice, Quantizer | None]],
    ) -> Latents:
        joined = {name: np.concatenate(column) for name, column in columns.items() if name != "z"}
        coded = all(quantizer is not None for _, quantizer in parts)
        z = np.concatenate(columns["z"]) if coded or len(parts) == 1 else self._mixed(columns["z"], masks)

        def names() -> tuple[list[str], np.ndarray]:
            tables = [(plan_rows(self.location, plan, shard), visible) for plan, shard, visible in masks]
            keys = [key for table, visible in tables for key, seen in zip(table.keys, visible, strict=True) if seen]
            return keys, np.concatenate([table.rows[visible] for table, visible in tables])

        return Latents(
            codes=z if coded else None, z=None if coded else z, labels=joined["label"], ids=joined["id"],
            psnr=joined["psnr"], augmentation=joined["augmentation"], parts=parts, names=names,
        )  # fmt: skip

    def _mixed(self, blocks: list[np.ndarray], masks: list[tuple[Plan, int, np.ndarray]]) -> np.ndarray:
        """Fragments of codes beside fragments of float32: all as float32."""
        quantizers = {plan.id: load_quantizer(self.location, plan) for plan, _, _ in masks}
        decoded = []
        for block, (plan, _, _) in zip(blocks, masks, strict=True):
            quantizer = quantizers[plan.id]
            decoded.append(quantizer.decode(block) if quantizer else block)
        return np.concatenate(decoded)

    def moments(self) -> Moments:
        """Of the training split's latents as readers see them (dequantised). Raises StorageError if it has none."""
        stored = self.commit.moments
        if stored is None:
            raise StorageError(f"{self.location.uri}: version {self.version} has no training rows, so no moments")
        data = read_vouched(self.location, stored.key, stored.object)
        return Moments.from_bytes(data, stored.count, stored.latent_shape)

    def field(self) -> tuple[dict[str, np.ndarray], dict[str, Any], str]:
        """(tensors, config, digest) of the field that decodes these latents."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        stem = f"fields/{self.field_digest}"
        objects = self.commit.objects
        record = unseal(
            read_vouched(self.location, f"{stem}.json", objects[f"{stem}.json"]),
            f"{self.location.uri}/{stem}.json",
            FieldRecord,
        )
        data = read_vouched(self.location, f"{stem}.safetensors", objects[f"{stem}.safetensors"])
        try:
            return load(data), record.config, record.digest
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise DamagedObject(f"{self.location.uri}/{stem}.safetensors: not a safetensors file ({error})") from None

    def info(self) -> dict[str, Any]:
        """The answer of `functa store info --json`: from receipts alone, no latent is read.

        bits_per_dim is measured: all bytes of z's objects, shard indexes and checksums included, over all numbers
        stored. psnr is of the latents before quantisation, as they were encoded: codes alone cannot tell theirs.
        """
        receipts = self._receipts
        numbers = sum(receipt.rows * plan.dims for _, plan, receipt in receipts)
        good = sum(receipt.good * plan.dims for _, plan, receipt in receipts)
        z_objects = [(k, o) for _, _, receipt in receipts for k, o in receipt.objects.items() if k.startswith("z/")]
        z_bytes = sum(record.bytes for _, record in z_objects)
        splits = sorted({entry.split for entry in self.commit.fragments}, reverse=True)
        bits = sorted({plan.quantization.bits if plan.quantization else 32 for _, plan in self.fragments})
        coded = {plan.quantization.policy: plan.quantization for _, plan in self.fragments if plan.quantization}
        return {
            "version": self.version,
            "rows": sum(entry.rows for entry in self.commit.fragments),
            "rows_by_split": {split: self.rows(split) for split in splits},
            "bad": sum(entry.bad for entry in self.commit.fragments),
            "retired": self._retired(),
            "fragments": len(self.commit.fragments),
            "shape": list(self.latent_shape) if self.fragments else [],
            "bits": bits[0] if len(bits) == 1 else bits,
            "bits_per_dim": z_bytes * 8 / max(1, numbers),
            "ranges": [{"policy": policy, "candidates": found.candidates} for policy, found in coded.items()],
            "clip_fraction": sum(receipt.clipped for _, _, receipt in receipts) / max(1, good),
            "psnr": _psnr([receipt for _, _, receipt in receipts])
            | {"by_split": {s: _psnr([r for e, _, r in receipts if e.split == s]) for s in splits}},
            "bytes": self._bytes([receipt for _, _, receipt in receipts]),
            "fingerprint": self.fingerprint,
            "fingerprint_digest": self.commit.fingerprint,
            "content": self.content,
            "field": self.field_digest,
        }

    def bad_inputs(self) -> list[dict[str, str]]:
        """{key, reason} of every image that is bad and not retired."""
        return [
            {"key": keys[row], "reason": reason}
            for entry, plan, receipt in self._receipts
            if receipt.bad
            for retired in [retired_rows(entry, plan, receipt.shard)]
            for keys in [plan_rows(self.location, plan, receipt.shard).keys]
            for row, reason in sorted(receipt.bad.items())
            if not retired[row]
        ]

    def _retired(self) -> int:
        """Rows that are no longer shown, but for those that another fragment holds anew."""
        shown = {entry.fragment for entry in self.commit.fragments}
        retired = sum(stop - start for entry in self.commit.fragments for start, stop in entry.retired)
        return retired - sum(plan.rows for _, plan in self.fragments if plan.replaces in shown)

    def _bytes(self, receipts: list[Receipt]) -> int:
        """Of all that this version needs: data, tables, metadata and records."""
        total = sum(record.bytes for receipt in receipts for record in receipt.objects.values())
        total += sum(record.bytes for _, plan in self.fragments for record in plan.objects.values())
        for entry in self.commit.fragments:
            total += entry.plan.bytes + sum(record.bytes for record in entry.receipts)
        total += sum(record.bytes for record in self.commit.objects.values())
        return total + (self.commit.moments.object.bytes if self.commit.moments else 0)


def _psnr(receipts: list[Receipt]) -> dict[str, Any]:
    """Mean, and quantiles to a tenth of a dB, from the receipts' sums and histograms; empty where no row is good."""
    counts: dict[int, int] = {}
    for receipt in receipts:
        for number, count in receipt.psnr.histogram.items():
            counts[number] = counts.get(number, 0) + count
    total = sum(counts.values())
    if total == 0:
        return {}
    bins = sorted(counts)
    reached = np.cumsum([counts[number] for number in bins])
    quantiles = {f"{q:g}": (bins[int(np.searchsorted(reached, q * total))] + 0.5) / BINS_PER_DB for q in QUANTILES}
    return {"mean": sum(receipt.psnr.sum for receipt in receipts) / total, "quantiles": quantiles}
