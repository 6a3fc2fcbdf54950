"""Encode the images of a folder with a ready-made field, each at its own size; nothing is trained.

Run again, it encodes what is new or has changed; rows of files that are no longer there stay.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from functa.models.measures.metrics import psnr_of_errors
from functa.storage.config import QuantizationConfig
from functa.storage.errors import StorageError
from functa.storage.functaset.commit import commit
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.header import create_functaset, read_root
from functa.storage.functaset.history import latest
from functa.storage.functaset.plan import RowTable
from functa.storage.functaset.planning import plan_fragment
from functa.storage.functaset.quantizer import Quantizer, calibrate
from functa.storage.functaset.shards.shard import Shard
from functa.storage.functaset.shards.writing import write_shard
from functa.storage.images.files import BadImage
from functa.storage.places.address import open_location
from functa.storage.places.location import Location
from functa.tasks.encoding.plan import environment
from functa.tasks.inference.photographs.files import Folder, Photograph, look_at, pixels_of
from functa.tasks.inference.photographs.store import SPLIT, Size, at_size, functasets_by_size
from functa.tasks.inference.ready.field import Coder, ReadyField
from functa.tasks.inputs.pictures import spread

CALIBRATED = 1 << 17  # patches whose latents set the quantiser's ranges

SHARD_BYTES = 32 << 20  # of latents: the most that a killed run has to encode again

CHUNK_NUMBERS = 1 << 18

SIZE_KEYS = ("images.height", "images.width")

Progress = Callable[[int, int], None]  # (images done, images in all)


@dataclass(frozen=True)
class _Row:
    """A row of the store: its functaset, fragment, row there, and the token of its image's version, "" if it is bad."""

    functaset: str
    fragment: str
    row: int
    token: str


@dataclass
class Encoded:
    """The outcome of an encoding: URIs of the functasets, and of the images encoded now PSNR in dB and size.

    psnr is of float32 latents, psnr_stored of those that the store holds; grey images became colour ones.
    """

    functasets: list[str]
    bad: dict[str, str]
    present: int  # images that were encoded before
    grey: int
    psnr: list[float] = field(default_factory=list)
    psnr_stored: list[float] = field(default_factory=list)
    pixels: int = 0
    stored_bytes: int = 0

    @property
    def bits_per_pixel(self) -> float:
        """Return the measured bits of latents for each pixel of the images encoded now."""
        return 8 * self.stored_bytes / max(1, self.pixels)


def encode_folder(
    ready: ReadyField, images: str, out: str, *, bits: int = 32, steps: int | None = None, device: str = "auto",
    progress: Progress = lambda done, total: None,
) -> Encoded:  # fmt: skip
    """Encode every image file of a folder into the store `out`, a functaset for each size of images.

    bits: 1 to 8 for each latent number, or 32 for float32. steps: inner steps, None for as many as were trained.
    Raises StorageError before anything is encoded where the field does not fit the images, or the store holds others.
    """
    store = open_location(out)
    quantization = QuantizationConfig.model_validate({"bits": bits, "granularity": "channel"})
    fingerprint = _fingerprint(ready, steps, quantization)
    _check_store(store, fingerprint)
    folder = look_at(images, ready)
    store.preflight_write()
    values = sum(each.size.height * each.size.width for each in folder.photographs) * ready.image_channels
    coder = ready.coder(device, steps, values)
    return _Work(ready, folder, store, quantization, fingerprint, coder, progress).encode()


def _fingerprint(ready: ReadyField, steps: int | None, quantization: QuantizationConfig) -> dict[str, Any]:
    """Return everything chosen that determines latents, but the size of the images."""
    inner = ready.inner.model_dump(mode="json", exclude=ready.inner.unused) | (
        {} if steps is None else {"steps": steps}
    )
    coding = quantization.model_dump(mode="json", exclude={"max_clip_fraction"})
    return {
        "field": ready.digest,
        **{f"inner.{key}": value for key, value in inner.items() if key != "compile"},
        "images.channels": ready.image_channels,
        "images.padding": f"pixels of the border, to whole patches of {ready.patch}x{ready.patch}",
        **{f"quantization.{key}": value for key, value in coding.items()},
    }


def _check_store(store: Location, fingerprint: Mapping[str, Any]) -> None:
    """Raise StorageError, naming what differs, where the store holds images that were encoded otherwise."""
    if store.exists("zarr.json"):
        raise StorageError(f"{store.uri}: is a functaset itself; choose another --out, a folder of functasets")
    for uri in functasets_by_size(store.uri):
        found = {key: value for key, value in read_root(open_location(uri)).fingerprint.items() if key not in SIZE_KEYS}
        differing = sorted(key for key in found.keys() | fingerprint.keys() if found.get(key) != fingerprint.get(key))
        if differing:
            changes = ", ".join(f"{key}: {found.get(key)} -> {fingerprint.get(key)}" for key in differing[:4])
            raise StorageError(
                f"{store.uri}: holds images that were encoded otherwise ({changes}); choose another --out"
            )


@dataclass
class _Work:
    """The encoding of a folder while it runs."""

    ready: ReadyField
    folder: Folder
    store: Location
    quantization: QuantizationConfig
    fingerprint: dict[str, Any]
    coder: Coder
    progress: Progress
    latents: dict[str, Tensor] = field(default_factory=dict)  # of the images that set the ranges, [1, h, w, c] each
    done: int = 0
    total: int = 0

    def encode(self) -> Encoded:
        """Encode what is new or has changed, one size after the other."""
        known = _rows(self.store)
        new = [each for each in self.folder.photographs if each.key not in known or known[each.key].token != each.token]
        grey = sum(not each.colour for each in new) if self.ready.image_channels == 3 else 0
        result = Encoded([], dict(self.folder.bad), len(self.folder.photographs) - len(new), grey)
        self.total = len(new)
        quantizer = self._quantizer(new)
        for size, some in Folder(self.folder.location, new, {}).by_size().items():
            location = self._create(size)
            result.functasets.append(location.uri)
            self._encode_size(location, size, some, quantizer, known, result)
        for row in (known[each.key] for each in new if each.key in known):  # of images that have another size now
            if row.functaset not in result.functasets:
                commit(open_location(row.functaset), [], {row.fragment: [row.row]})
        return result

    def _quantizer(self, new: Sequence[Photograph]) -> Quantizer | None:
        """Return a quantiser for latents like those of some of the new images, or of all; None for float32.

        Every fragment has its own: ranges that earlier images set might clip these.
        """
        if self.quantization.bits == 32 or not new:
            return None
        patches = sum(math.prod(self.ready.grid(*each.size)) for each in new)
        count = min(len(new), math.ceil(CALIBRATED * len(new) / patches))
        for each in (new[row] for row in spread(len(new), count)):
            try:
                pixels, _ = pixels_of(self.folder.location, each.key, self.ready.image_channels)
            except BadImage:
                continue
            self.latents[each.key] = self.coder.encode(torch.from_numpy(pixels)[None])
        latents = torch.cat([z.reshape(-1, 1, 1, self.ready.channels) for z in self.latents.values()])
        return calibrate(self.quantization, latents.numpy())

    def _create(self, size: Size) -> Location:
        location = at_size(self.store, size)
        field, inner = self.ready.module.config, self.ready.inner
        described = {
            "field": field.model_dump(mode="json", exclude=field.unused),
            "inner": inner.model_dump(mode="json", exclude=inner.unused),
            "image_channels": self.ready.image_channels,
            "resolution": self.ready.patch,
        }
        tensors = {name: value.numpy() for name, value in self.ready.module.state_dict().items()}
        sized = self.fingerprint | dict(zip(SIZE_KEYS, size, strict=True))
        create_functaset(location, sized, tensors, described, self.ready.digest)
        return location

    def _encode_size(
        self, location: Location, size: Size, some: Sequence[Photograph], quantizer: Quantizer | None,
        known: Mapping[str, _Row], result: Encoded,
    ) -> None:  # fmt: skip
        """Encode images of one size as a fragment of their functaset, which replaces rows of older versions."""
        newest = latest(location)
        taken = () if newest is None else (*newest.retired_fragments, *(each.fragment for each in newest.fragments))
        shape = (*self.ready.grid(*size), self.ready.channels)
        numbers = shape[0] * shape[1] * shape[2]
        fragment = plan_fragment(
            location,
            RowTable.of([each.key for each in some], np.zeros(len(some), np.int32), [each.token for each in some]),
            split=SPLIT, latent_shape=shape, shard_rows=max(1, SHARD_BYTES // (4 * numbers)),
            chunk_rows=max(1, CHUNK_NUMBERS // numbers), quantizer=quantizer, versions=environment(self.coder.loop),
            taken=taken,
        )  # fmt: skip
        for shard in fragment.shards:
            self._encode_shard(shard, size, result)
        retire: dict[str, list[int]] = {}
        for row in (known[each.key] for each in some if each.key in known):
            if row.functaset == location.uri:
                retire.setdefault(row.fragment, []).append(row.row)
        commit(location, [fragment.id], retire)

    def _encode_shard(self, shard: Shard, size: Size, result: Encoded) -> None:
        """Encode and write a shard's images, or adopt it where an earlier run has written it."""
        table = shard.table()
        receipt = shard.find_receipt()
        if receipt is None:
            rows = [self._encode_row(shard, size, key, token) for key, token in zip(table.keys, table.tokens)]
            good = np.array([not each.reason for each in rows])
            result.psnr += [each.psnr for each in rows if not each.reason]
            result.psnr_stored += [each.stored for each in rows if not each.reason]
            receipt = write_shard(
                shard, latents=np.stack([each.z for each in rows]),
                psnr=np.array([each.psnr for each in rows], np.float32),
                sha256=np.stack([np.frombuffer(each.sha256, np.uint8) for each in rows]), good=good,
                reasons={number: each.reason for number, each in enumerate(rows) if each.reason},
                versions=environment(self.coder.loop),
            )  # fmt: skip
        result.bad |= {table.keys[row]: reason for row, reason in receipt.bad.items()}
        result.pixels += receipt.good * size.height * size.width
        result.stored_bytes += sum(record.bytes for key, record in receipt.objects.items() if key.startswith("z/"))

    def _encode_row(self, shard: Shard, size: Size, key: str, token: str) -> "_Encoding":
        """Encode one image; PSNR is of its own pixels, without those that fill it up."""
        empty = np.zeros(shard.fragment.plan.latent_shape, np.float32)
        try:
            entry = self.folder.location.entry(key)
            pixels, data = pixels_of(self.folder.location, key, self.ready.image_channels)
        except (BadImage, StorageError) as error:
            return _Encoding(empty, bytes(32), str(error))
        sha256 = hashlib.sha256(data).digest()
        if entry is None or entry.token != token or pixels.shape[:2] != tuple(size):
            return _Encoding(empty, sha256, "changed since it was planned")
        images = torch.from_numpy(pixels)[None]
        z = self.latents.pop(key, None)
        z = self.coder.encode(images) if z is None else z
        found = _Encoding(z[0].numpy(), sha256, "", self._psnr(z, images))
        quantizer = shard.fragment.quantizer
        if quantizer is None:
            found.stored = found.psnr
        else:
            stored = torch.from_numpy(quantizer.decode(quantizer.encode(z.numpy())[0]))
            found.stored = self._psnr(stored, images)
        self.done += 1
        self.progress(self.done, self.total)
        return found

    def _psnr(self, z: Tensor, images: Tensor) -> float:
        return psnr_of_errors(self.coder.errors(z, images)).item()


@dataclass
class _Encoding:
    """A row to be written: latent [h, w, c], sha256 of the file, why it is bad or "", PSNR before and after coding."""

    z: np.ndarray
    sha256: bytes
    reason: str
    psnr: float = float("nan")
    stored: float = float("nan")


def _rows(store: Location) -> dict[str, _Row]:
    """Return the rows of all functasets of a store that are not retired, by key."""
    found: dict[str, _Row] = {}
    for uri in functasets_by_size(store.uri):
        if latest(open_location(uri)) is None:
            continue
        for shard in Functaset.open(uri).shards():
            table, bad = shard.table(), set(shard.bad.tolist())
            for row in np.flatnonzero(~shard.retired).tolist():
                token = "" if row in bad else table.tokens[row]  # another try replaces a bad row
                found[table.keys[row]] = _Row(uri, shard.fragment.id, shard.first + row, token)
    return found
