"""A split memory-mapped: hydrated raw files, or the store's own float32 shards where they lie on this machine.

A float32 shard is stored without compression: chunks of C-order rows, each followed by its CRC-32C, and an index of
where they begin. zarr promises no order of chunks, so the index is read, and trusted only as the receipt's sha256 has
it. Pages come and go with what is read: memory need not hold the split.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from functa.storage.errors import DamagedObject, MissingObject, StorageError
from functa.storage.functaset.fragment import Fragment
from functa.storage.functaset.records import ObjectRecord
from functa.storage.functaset.shards.shard import Shard, check_values
from functa.storage.functaset.zarr_bytes import chunk_offsets
from functa.storage.places.local import LocalLocation
from functa.storage.readers.hydrate import ARRAYS, HydratedFragment, default_folder, sha256_of
from functa.storage.readers.reader import Batch, Indexed
from functa.storage.readers.shards import SplitShards


@dataclass(frozen=True)
class _Piece:
    """Visible rows of a file: its bytes, the offset of each row, and labels, ids and quantiser numbers of the rows.

    `checks` are the number of rows of each shard, and what checks their latents when one is read for the first time.
    `rows` [n, bytes of a row] is the file as an array where it is nothing but rows, else None.
    """

    data: np.ndarray
    begins: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    which: np.ndarray
    checks: list[tuple[int, Callable[[], None]]]
    rows: np.ndarray | None = None


class Mapped(Indexed):
    """All visible rows, mapped: lengths, labels and ids are checked when it is opened, a shard's latents when read.

    So a training begins at once, however large the files are. Raises StorageError where a shard is neither hydrated in
    `folder` nor raw on this machine.
    """

    def __init__(self, split: SplitShards, folder: str | None = None) -> None:
        if split.mixed:
            raise StorageError(f"{split.name}: codes beside float32 cannot be mapped; read it in memory or streamed")
        super().__init__(split.name, split.rows, split.latent_shape, split.quantizers)
        pieces = []
        for fragment, shards in split.by_fragment():
            hydrated = HydratedFragment.of(folder or default_folder(), fragment)
            if all(hydrated.has(shard) for shard in shards):
                pieces.append(_hydrated(split, hydrated, shards))
            else:
                pieces += [_raw(split, shard) for shard in shards]
        self.labels = np.concatenate([piece.labels for piece in pieces])
        self.ids = np.concatenate([piece.ids for piece in pieces])
        self._which = np.concatenate([piece.which for piece in pieces]) if len(split.quantizers) > 1 else None
        self._begins = np.concatenate([piece.begins for piece in pieces])
        self._files = np.repeat(np.arange(len(pieces), dtype=np.int32), [len(piece.begins) for piece in pieces])
        checks = [each for piece in pieces for each in piece.checks]
        self._shards = np.repeat(np.arange(len(checks), dtype=np.int32), [rows for rows, _ in checks])
        self._checks = {number: check for number, (_, check) in enumerate(checks)}
        self._checked = np.zeros(len(checks), bool)
        self._bytes = [piece.data.data for piece in pieces]
        self._width = int(np.prod(self.latent_shape)) * self.dtype.itemsize
        # One file of nothing but rows: numpy gathers them at once.
        self._whole = None
        if len(pieces) == 1 and pieces[0].rows is not None:
            self._whole = pieces[0].rows.view(self.dtype).reshape(-1, *self.latent_shape)

    def _read(self, rows: np.ndarray, ids: bool, out: np.ndarray | None) -> Batch:
        if self._checks:
            self._check(rows)
        begins = self._begins[rows]
        if self._whole is not None:
            z = self._whole.take(begins // self._width, 0, out=out, mode="clip")
        else:
            # Joining slices copies each row once; numpy's own gather would have to go file by file.
            wanted = zip(self._files[rows].tolist(), begins.tolist(), strict=True)
            joined = bytearray().join([self._bytes[file][begin : begin + self._width] for file, begin in wanted])
            z = np.frombuffer(joined, self.dtype).reshape(-1, *self.latent_shape)
            if out is not None:
                out[:] = z
                z = out
        which = None if self._which is None else self._which[rows]
        return Batch(z, self.labels[rows], self.ids[rows] if ids else None, which)

    def _check(self, rows: np.ndarray) -> None:
        """Check the shards of these rows that were not read before. Raises DamagedObject."""
        shards = np.unique(self._shards[rows])
        for number in shards[~self._checked[shards]].tolist():
            self._checks.pop(number)()
            self._checked[number] = True


def mappable(split: SplitShards, folder: str | None = None) -> bool:
    """Return whether all shards are hydrated, or raw on this machine; the files themselves are not read."""

    def ready(fragment: Fragment, shards: list[Shard]) -> bool:
        hydrated = HydratedFragment.of(folder or default_folder(), fragment)
        return _is_raw(fragment) or all(hydrated.has(shard) for shard in shards)

    return not split.mixed and all(ready(fragment, shards) for fragment, shards in split.by_fragment())


def _is_raw(fragment: Fragment) -> bool:
    return fragment.quantizer is None and isinstance(fragment.location, LocalLocation)


def _hydrated(split: SplitShards, hydrated: HydratedFragment, shards: list[Shard]) -> _Piece:
    files = {array: hydrated.mapped(array) for array in ARRAYS}
    latents = {"z": files["z"]}
    checks: list[tuple[int, Callable[[], None]]] = []
    for shard in shards:
        record = hydrated.record(shard)
        hydrated.check(shard, {array: files[array] for array in ARRAYS if array != "z"}, record)
        checks.append((shard.count, partial(hydrated.check, shard, latents, record)))
    rows = np.concatenate([shard.rows + shard.first for shard in shards])
    labels = files["label"].view(np.int32).reshape(-1)[rows]
    which = np.full(len(rows), split.quantizer_number(shards[0]), np.int64)
    begins = rows * hydrated.row_bytes("z")
    return _Piece(files["z"].reshape(-1), begins, labels, files["id"][rows], which, checks, files["z"])


def _raw(split: SplitShards, shard: Shard) -> _Piece:
    """Map a float32 shard's own object in the store."""
    fragment = shard.fragment
    if not _is_raw(fragment):
        raise StorageError(f"{shard.name}: is compressed or elsewhere; run `functa store hydrate`, then map it")
    key, record = shard.object("z")
    path, size = Path(fragment.location.uri, key), fragment.location.size(key)
    if size is None:
        raise MissingObject(f"{path}: is missing; restore it from a copy")
    if size != record.bytes:
        raise DamagedObject(f"{path}: has {size} bytes and should have {record.bytes}; restore it from a copy")
    data = np.memmap(path, np.uint8, "r")
    spec = fragment.plan.arrays["z"]
    offsets = chunk_offsets(fragment.document("z"), spec, data, shard.number)  # inside the file, whatever it holds
    if offsets is None:
        _check_object(path, data, record)
        raise StorageError(f"{path}: its chunks are not plain rows; run `functa store hydrate`, then map it")
    within = shard.rows
    width = fragment.plan.dims * 4
    begins = offsets[within // spec.chunk_rows] + within % spec.chunk_rows * width

    def check() -> None:
        _check_object(path, data, record)
        for start in range(0, len(begins), 1024):
            rows = [data[begin : begin + width] for begin in begins[start : start + 1024]]
            check_values(shard.name, np.stack(rows).view(np.float32))

    columns = shard.columns("label", "id")
    which = np.full(len(within), split.quantizer_number(shard), np.int64)
    return _Piece(data, begins, columns["label"], columns["id"], which, [(len(within), check)])


def _check_object(path: Path, data: np.ndarray, record: ObjectRecord) -> None:
    if sha256_of(data) != record.sha256:
        raise DamagedObject(f"{path}: was altered (sha256 does not match); restore it from a copy")
