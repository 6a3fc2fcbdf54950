"""Functaset: what one version of a functaset shows; every byte is checked, and none is ever a fill value."""

import os
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from functa.storage.errors import DamagedObject, MissingObject, StorageError
from functa.storage.functaset.fragment import Fragment
from functa.storage.functaset.header import FieldRecord, read_root
from functa.storage.functaset.history import Commit, FragmentEntry, latest, load_commit
from functa.storage.functaset.plan import RowTable
from functa.storage.functaset.quantizer import Quantizer
from functa.storage.functaset.receipts.moments import Moments
from functa.storage.functaset.receipts.receipt import IDENTITY, content_of, sum_of_contents
from functa.storage.functaset.receipts.sums import ReceiptSum, quantiles_of
from functa.storage.functaset.records import digest, read_vouched, unseal
from functa.storage.functaset.shards.shard import Shard
from functa.storage.places.address import MAX_STAGE_BYTES, open_location, read_json
from functa.storage.places.location import Location, refuse_fork
from functa.storage.places.reused import output_of
from functa.storage.places.side_by_side import side_by_side

ENCODED = "stages/encode.json"  # a root's record of its encoding (storage/runs/stage_records.py)

COLUMNS = ("z", "label", "id", "psnr", "augmentation")


@dataclass(frozen=True, eq=False)
class Latents:
    """Rows of a split in memory, in the store's order (not the source's: go by `ids` or `keys`).

    codes uint8 [n, s, s, c] or z float32 [n, s, s, c], the other is None; labels int32 [n]; ids uint8 [n, 16];
    psnr float32 [n] in dB, of the latents before quantisation; augmentation int32 [n], 0 for the image as it is. z and
    codes are raw, as the inner loop found them: normalise them before they train anything.
    """

    codes: np.ndarray | None
    z: np.ndarray | None
    labels: np.ndarray
    ids: np.ndarray
    psnr: np.ndarray
    augmentation: np.ndarray
    shards: list[Shard]  # that the rows are of, in their order

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        values = self.z if self.codes is None else self.codes
        assert values is not None
        shape = "x".join(map(str, values.shape[1:]))
        return f"Latents({len(self):,} rows of {shape}, {'float32' if self.codes is None else 'uint8 codes'})"

    @cached_property
    def keys(self) -> list[str]:
        """The images' stable keys; read at first use."""
        return [key for table in self._tables for key in table.keys]

    @cached_property
    def source_rows(self) -> np.ndarray:
        """int64 [n]: each one's row in the sequence that its fragment was planned from; read at first use."""
        return np.concatenate([table.rows for table in self._tables])

    @cached_property
    def _tables(self) -> list[RowTable]:
        return [shard.table().take(shard.rows) for shard in self.shards]

    def dequantized(self, rows: np.ndarray | None = None) -> np.ndarray:
        """Return float32 [n, s, s, c] of the rows asked for, or of all."""
        wanted = np.arange(len(self)) if rows is None else np.asarray(rows)
        if self.codes is None:
            assert self.z is not None
            return self.z if rows is None else self.z[wanted]
        z = np.empty((len(wanted), *self.codes.shape[1:]), np.float32)
        start = 0
        for fragment, group in groupby(self.shards, key=lambda shard: shard.fragment):
            stop = start + sum(shard.count for shard in group)
            mine = (wanted >= start) & (wanted < stop)
            z[mine] = fragment.dequantized(self.codes[wanted[mine]])
            start = stop
        return z


class Functaset:
    """One version of a functaset: latents of images, with labels, and the field that decodes them.

    Functaset.open(location) opens it; load(split) reads a split into memory, open_reader(functaset, split) in batches.
    Latents are raw, as the inner loop found them, mostly within hundredths of zero: normalise them with moments()
    before they train anything. Every method raises StorageError naming what is missing, short or altered.
    """

    def __init__(self, location: Location, commit: Commit, fingerprint: dict[str, Any], field: str) -> None:
        self.location, self.commit, self.fingerprint, self.field_digest = location, commit, fingerprint, field
        self._process = os.getpid()

    def __repr__(self) -> str:
        splits = ", ".join(f"{self.rows(split):,} {split}" for split in self.splits) or "no rows"
        return f"Functaset('{self.location.uri}', version {self.version}: {splits})"

    @classmethod
    def open(cls, location: str | Path | Location, version: int | None = None) -> "Functaset":
        """Open the newest version, or an older one. Raises StorageError: none there, nothing committed, altered.

        location: a folder, an s3:// URI, or a Location; of a run's root its functaset is opened, also where --from left
        it in another root.
        """
        if not isinstance(location, Location):
            location = open_location(str(location))
        try:
            root = read_root(location)
        except MissingObject:
            location = _functaset_of(location)
            root = read_root(location)
        commit = latest(location) if version is None else load_commit(location, version)
        if commit is None:
            raise StorageError(f"{location.uri}: nothing is committed yet; finish encoding first")
        if commit.fingerprint != root.fingerprint_digest:
            raise DamagedObject(f"{location.uri}/zarr.json: is not the one that was committed; restore it from a copy")
        read_vouched(location, "zarr.json", commit.objects["zarr.json"])
        return cls(location, commit, root.fingerprint, root.field)

    def own(self) -> None:
        """Check that this process opened it. Raises StorageError in a fork."""
        refuse_fork(self._process, self.location.uri)

    @property
    def version(self) -> int:
        """Number of the commit."""
        return self.commit.version

    @property
    def splits(self) -> list[str]:
        """Names of the splits that it has, train first."""
        return sorted({entry.split for entry in self.commit.fragments}, reverse=True)

    @cached_property
    def fragments(self) -> list[Fragment]:
        """Visible fragments, in the order of their commits; with their manifests, which are read side by side."""
        self.own()

        def read(entry: FragmentEntry) -> Fragment:
            fragment = Fragment.committed(self.location, entry)
            _ = fragment.manifest
            return fragment

        return list(side_by_side(self.location, read, self.commit.fragments))

    @cached_property
    def _live(self) -> list[Shard]:
        return [shard for fragment in self.fragments for shard in fragment.live]

    def shards(self, split: str | None = None) -> list[Shard]:
        """Return the shards of a split, or of all, that hold a row which is not retired. Raises for a split without."""
        found = [shard for shard in self._live if split in (None, shard.fragment.split)]
        if split is not None and not any(fragment.split == split for fragment in self.fragments):
            has = f"it has {' and '.join(self.splits)}" if self.splits else "it has none"
            raise StorageError(f"{self.location.uri}: version {self.version} has no rows of split '{split}'; {has}")
        return found

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(s, s, c): s x s latent positions of c channels. Raises StorageError where nothing is shown."""
        if not self.fragments:
            raise StorageError(f"{self.location.uri}: version {self.version} shows no rows")
        return self.fragments[0].plan.latent_shape

    def quantizer(self, fragment: str) -> Quantizer | None:
        """Return a fragment's quantiser, None for float32."""
        return next(each.quantizer for each in self.fragments if each.id == fragment)

    @cached_property
    def content(self) -> str:
        """Digest of which images are encoded by which choices: the same wherever, whenever and in whatever shards.

        Over the fingerprint and the visible rows' ids, labels and source bytes. Not over fragments, whose ids follow
        the sources' file times and the quantiser's last bits, and which a repair makes anew.
        """
        contents = side_by_side(self.location, _content, self.shards())
        return digest({"fingerprint": self.commit.fingerprint, "rows": sum_of_contents(contents)})

    def rows(self, split: str) -> int:
        """Return the number of visible rows of a split."""
        return sum(entry.rows for entry in self.commit.fragments if entry.split == split)

    def load(self, split: str) -> Latents:
        """Read all visible rows of a split into memory; every object's length and sha256 is checked on the way.

        Codes stay codes where all fragments have them; Latents.dequantized gives float32.
        """
        self.own()
        shards = self.shards(split)
        coded = all(shard.fragment.quantizer for shard in shards)  # reads and checks their ranges, too
        alike = coded or len({shard.fragment for shard in shards}) == 1
        blocks = []
        read = side_by_side(self.location, lambda shard: shard.columns(*COLUMNS), shards)
        for shard, block in zip(shards, read, strict=True):
            # Fragments of codes beside fragments of float32: all as float32.
            blocks.append(block if alike else block | {"z": shard.fragment.dequantized(block["z"])})
        columns = {name: np.concatenate([block[name] for block in blocks]) for name in COLUMNS}
        return Latents(
            codes=columns["z"] if coded else None, z=None if coded else columns["z"], labels=columns["label"],
            ids=columns["id"], psnr=columns["psnr"], augmentation=columns["augmentation"], shards=shards,
        )  # fmt: skip

    def moments(self) -> Moments:
        """Return mean and variance [s, s, c] of the training split's latents. Raises StorageError if it has none."""
        stored = self.commit.moments
        if stored is None:
            raise StorageError(f"{self.location.uri}: version {self.version} has no training rows, so no moments")
        data = read_vouched(self.location, stored.key, stored.object)
        return Moments.from_bytes(data, stored.count, stored.latent_shape)

    def field(self) -> tuple[dict[str, np.ndarray], dict[str, Any], str]:
        """Return (tensors, config, digest) of the field that decodes these latents."""
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
        """Return the answer of `functa store info --json`: from receipts alone, no latent is read.

        bits_per_dim is measured: all bytes of z's objects (z_bytes), shard indexes and checksums included, over all
        numbers stored. psnr is of the latents before quantisation, as they were encoded, but of images with clipped
        numbers that of the stored latents. clip_fraction is of all fragments, clip_fraction_worst of the worst one.
        """
        plans = [fragment.plan for fragment in self.fragments]
        bits = sorted({plan.bits for plan in plans})
        coded = {plan.quantization.policy: plan.quantization for plan in plans if plan.quantization}
        sums = [(fragment, _sum(fragment)) for fragment in self.fragments]
        numbers = sum(each.rows * fragment.plan.dims for fragment, each in sums)
        good = sum(each.good * fragment.plan.dims for fragment, each in sums)
        z_bytes = sum(each.z_bytes for _, each in sums)
        by_split = {
            split: quantiles_of([each for fragment, each in sums if fragment.split == split]) for split in self.splits
        }
        return {
            "version": self.version,
            "rows": sum(entry.rows for entry in self.commit.fragments),
            "rows_by_split": {split: self.rows(split) for split in self.splits},
            "bad": sum(entry.bad for entry in self.commit.fragments),
            "retired": self._retired(),
            "fragments": len(self.commit.fragments),
            "shape": list(self.latent_shape) if self.fragments else [],
            "bits": bits[0] if len(bits) == 1 else bits,
            "bits_per_dim": z_bytes * 8 / max(1, numbers),
            "ranges": [{"policy": policy, "candidates": found.candidates} for policy, found in coded.items()],
            "clip_fraction": sum(each.clipped for _, each in sums) / max(1, good),
            "clip_fraction_worst": max(
                (each.clipped / max(1, each.good * fragment.plan.dims) for fragment, each in sums), default=0.0
            ),
            "psnr": quantiles_of([each for _, each in sums]) | {"by_split": by_split},
            "bytes": self._bytes() + sum(each.bytes for _, each in sums),
            "z_bytes": z_bytes,
            "fingerprint": self.fingerprint,
            "fingerprint_digest": self.commit.fingerprint,
            "content": self.content,
            "field": self.field_digest,
        }

    def bad_inputs(self) -> list[dict[str, str]]:
        """Return {key, reason} of every image that is bad and not retired."""
        found = []
        shards = [shard for shard in self.shards() if len(shard.bad)]
        for shard, table in zip(shards, side_by_side(self.location, Shard.table, shards), strict=True):
            retired, bad = shard.retired, sorted(shard.receipt.bad.items())
            found += [{"key": table.keys[row], "reason": reason} for row, reason in bad if not retired[row]]
        return found

    def _retired(self) -> int:
        """Count the rows that are no longer shown, but for those that another fragment holds anew."""
        shown = {entry.fragment for entry in self.commit.fragments}
        retired = sum(stop - start for entry in self.commit.fragments for start, stop in entry.retired)
        again = [fragment.plan for fragment in self.fragments if shown.intersection(fragment.plan.replaces.split())]
        return retired - sum(plan.rows for plan in again)

    def _bytes(self) -> int:
        """Count the bytes of what this version needs beside the shards' objects: tables, metadata and records."""
        records = [record for fragment in self.fragments for record in fragment.plan.objects.values()]
        records += [record for fragment in self.fragments for record in fragment.receipt_records]
        for entry in self.commit.fragments:
            records += [entry.plan, *([entry.manifest] if entry.manifest else [])]
        records += [*self.commit.objects.values(), *(named.object for named in self.commit.lists)]
        records += [self.commit.moments.object] if self.commit.moments else []
        return sum(record.bytes for record in records)


def _sum(fragment: Fragment) -> ReceiptSum:
    total = ReceiptSum()
    for receipt in side_by_side(fragment.location, lambda shard: shard.receipt, fragment.live):
        total.add(receipt)
    return total


def _content(shard: Shard) -> str:
    if not shard.retired.any():
        return shard.content
    visible = shard.visible
    return content_of(shard.fragment.split, {name: shard.array(name)[visible] for name in IDENTITY})


def _functaset_of(root: Location) -> Location:
    """Return where a run's root has its functaset; another location as it is."""
    try:
        return output_of(root, read_json(root, ENCODED, MAX_STAGE_BYTES)["output"])
    except (MissingObject, KeyError, TypeError, AttributeError):
        return root
