"""Encode a group of shards: read images, compute latents, write shards with their receipts. Safe to repeat.

The three steps overlap: while the device computes a batch, one thread reads and decodes the next batch and another
writes the previous shard.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from functa.models.compute.compilation import announced, should_compile
from functa.models.compute.device import least_used_device
from functa.models.config import InnerConfig
from functa.models.field.cost import encode_passes, forward_flops
from functa.models.field.field import Field
from functa.models.field.inner import InnerLoop
from functa.models.measures.metrics import psnr_of_errors
from functa.storage.errors import StorageError
from functa.storage.functaset.fragment import Fragment
from functa.storage.functaset.plan import RowTable
from functa.storage.functaset.receipts.receipt import Receipt
from functa.storage.functaset.shards.shard import Shard
from functa.storage.functaset.shards.writing import write_shard
from functa.storage.images.source import ImageBatch
from functa.storage.places.address import open_location
from functa.storage.readers.prefetch import prefetched
from functa.tasks.dispatch.child import RunEnded
from functa.tasks.dispatch.progress import Pace, count, images_per_second
from functa.tasks.encoding.float_latents import FloatLatents
from functa.tasks.encoding.keyed_images import PlannedImages, planned_images
from functa.tasks.encoding.plan import EncodeJob, ShardGroup, encoding_loop, environment
from functa.tasks.inputs.pictures import as_float, pinned
from functa.tasks.trained import load_field

Stats = dict[str, Any]

FAR_OUTSIDE = 0.1  # of an image's latent numbers outside the quantiser's range: reported by name

ProgressCallback = Callable[[int, int, str], None]  # (shards done, shards in all, one line)


@dataclass
class _Shard:
    """A shard that is being encoded: its rows, and the results so far."""

    shard: Shard
    rows: RowTable
    latents: list[Tensor] = field(default_factory=list)
    psnr: list[Tensor] = field(default_factory=list)
    read: list[ImageBatch] = field(default_factory=list)
    seconds: float = 0.0  # of encoding

    @property
    def encoded(self) -> int:
        """Return the number of rows encoded so far."""
        return sum(len(batch.good) for batch in self.read)


def encode_group(
    job: EncodeJob,
    group: ShardGroup,
    images_in_run: int,
    progress: ProgressCallback | None = None,
    *,
    run: str = "",
    run_ended: Callable[[], bool] = lambda: False,
) -> Stats:
    """Encode every shard of the group that has no receipt yet; return the group's statistics.

    They are images, bad, psnr (a sum), adopted (shards that existed), outside ({key: share} of images far outside the
    quantiser's range), seconds from start (`begun`, seconds since the epoch) to end, seconds spent in the overlapping
    steps read, encode and write, and mode (compiled or eager, and why). `progress` is called after each shard, and
    before the first one if that is compiled. Groups of one `run` share the opened source; nothing is listed.
    Shards whose latents another functaset has (job.latents) are taken from there.
    Raises RunEnded before the next batch once `run_ended` returns True; complete shards are written first.
    """
    begun = time.monotonic()
    fragment = Fragment.load(open_location(job.functaset), group.fragment)
    left = [shard for number in group.shards if (shard := fragment.shards[number]).find_receipt() is None]
    stats: Stats = {"images": 0, "bad": 0, "read": 0.0, "encode": 0.0, "write": 0.0, "psnr": 0.0, "mode": ""}
    stats["outside"] = {}
    stats |= {"adopted": len(group.shards) - len(left), "begun": time.time(), "seconds": 0.0}
    report = progress or (lambda done, shards, line: None)
    if not left:
        report(len(group.shards), len(group.shards), describe_stats(stats))
        return stats
    trained, inner, metadata = load_field(job.field)
    inner = encoding_loop(inner, job.encode)
    side, channels = metadata["resolution"], trained.image_channels
    images = planned_images(job.images, job.encode.augmentation, (side, side, channels), run)
    with least_used_device(job.device) as device:
        loop, stats["mode"] = _loop(job, trained, inner, side, images_in_run, device)
        if loop.compiled:
            report(0, len(group.shards), announced(stats["mode"]))
        known = FloatLatents(job.latents) if job.latents else None
        _Work(job, group, left, images, loop, known, stats, report, run_ended, begun).encode()
    return stats


@dataclass
class _Work:
    """The encoding of a group while it runs."""

    job: EncodeJob
    group: ShardGroup
    left: Sequence[Shard]  # to encode
    images: PlannedImages
    loop: InnerLoop
    known: FloatLatents | None
    stats: Stats
    report: ProgressCallback
    run_ended: Callable[[], bool]
    begun: float  # when the group began, before opening and compiling
    written: int = 0
    encoded_rows: int = 0
    pace: Pace = field(default_factory=Pace)

    def encode(self) -> None:
        """Encode and write shards in turn: while the device encodes one, a thread writes the one before."""
        for _ in prefetched(partial(self._write, shard) for shard in self._encoded()):
            pass

    def _encoded(self) -> Iterator[_Shard]:
        """Yield each shard once all its batches are encoded; a thread reads the next batch meanwhile."""
        shards = [_Shard(each, each.table()) for each in self.left]
        unknown = []
        for shard in shards:
            self._stop_with_run(shard)
            if self._take(shard):
                yield shard
            else:
                unknown.append(shard)
        pieces = [(shard, rows) for shard in unknown for rows in _pieces(shard.rows, self.job.encode.batch)]
        with closing(prefetched(partial(self._read, rows) for _, rows in pieces)) as batches:
            for (shard, _), batch in zip(pieces, batches, strict=True):
                self._stop_with_run(shard)
                self._encode(shard, batch)
                if shard.encoded == len(shard.rows.keys):
                    yield shard

    def _stop_with_run(self, shard: _Shard) -> None:
        if self.run_ended():
            number, split = shard.shard.number, self.group.split
            raise RunEnded(f"shard {number} of {split} was not encoded: its run has ended")

    def _take(self, shard: _Shard) -> bool:
        """Take the latents from the functaset that has them, if it has this shard's; else return False."""
        begun = time.monotonic()
        found = None if self.known is None else self.known.find(shard.shard, shard.rows)
        if found is None:
            return False
        z, psnr = (torch.from_numpy(np.array(array)) for array in (found.latents, found.psnr))
        read = ImageBatch(np.empty(0, np.uint8), found.good, found.bad, found.sha256, list(shard.rows.tokens))
        self._measure_clipped(shard, read, z, psnr, lambda rows: self.images.read(shard.rows.take(rows)).images)
        shard.latents.append(z)
        shard.psnr.append(psnr)
        shard.read.append(read)
        shard.seconds += time.monotonic() - begun
        self.stats["read"] += time.monotonic() - begun
        self.encoded_rows += len(found.good)
        return True

    def _read(self, rows: RowTable) -> ImageBatch:
        begun = time.monotonic()
        batch = self.images.read(rows)
        if self.group.readable and batch.reasons:
            row, reason = min(batch.reasons.items())
            raise StorageError(f"{rows.keys[row]}: {reason}; restore the image, or retire its row: --retire-lost")
        batch = replace(batch, images=pinned(batch.images, _device(self.loop)))
        self.stats["read"] += time.monotonic() - begun
        return batch

    def _encode(self, shard: _Shard, batch: ImageBatch) -> None:
        begun = time.monotonic()
        z, errors = encode_images(self.loop, batch.images, self.job.encode.batch)
        psnr = psnr_of_errors(errors)
        self._measure_clipped(shard, batch, z, psnr, lambda rows: batch.images[rows])
        shard.latents.append(z)
        shard.psnr.append(psnr)
        # Pixels are not needed any more, and many batches wait in a large shard.
        shard.read.append(ImageBatch(batch.images[:0], batch.good, batch.reasons, batch.sha256, batch.tokens))
        shard.seconds += time.monotonic() - begun
        self.stats["encode"] += time.monotonic() - begun
        self.encoded_rows += len(batch.good)
        self.pace.per_second(self.encoded_rows)

    def _measure_clipped(
        self, shard: _Shard, batch: ImageBatch, z: Tensor, psnr: Tensor, pixels: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        """Replace the PSNR of images with clipped numbers by that of the latents that are stored."""
        quantizer = shard.shard.fragment.quantizer
        if quantizer is None:
            return
        counts = quantizer.outside(z.numpy()) * batch.good
        rows = np.flatnonzero(counts)
        if not len(rows):
            return
        stored = torch.from_numpy(quantizer.decode(quantizer.encode(z.numpy()[rows])[0]))
        psnr[rows] = psnr_of_errors(errors_of(self.loop, pixels(rows), stored, self.job.encode.batch))
        shares = counts / z[0].numel()
        far = np.flatnonzero(shares > max(FAR_OUTSIDE, self.job.encode.quantization.max_clip_fraction))
        self.stats["outside"] |= {shard.rows.keys[shard.encoded + row]: float(shares[row]) for row in far.tolist()}

    def _write(self, shard: _Shard) -> None:
        begun = time.monotonic()
        starts = np.cumsum([0, *(len(batch.good) for batch in shard.read)])
        receipt = write_shard(
            shard.shard,
            latents=torch.cat(shard.latents).numpy(),
            psnr=torch.cat(shard.psnr).numpy(),
            sha256=np.concatenate([batch.sha256 for batch in shard.read]),
            good=np.concatenate([batch.good for batch in shard.read]),
            reasons={int(at) + p: why for at, batch in zip(starts, shard.read) for p, why in batch.reasons.items()},
            max_clip_fraction=1.0 if self.group.frozen_ranges else self.job.encode.quantization.max_clip_fraction,
            seconds=shard.seconds,
            versions=environment(self.loop),
        )
        self.stats["write"] += time.monotonic() - begun
        self._count(shard, receipt)

    def _count(self, shard: _Shard, receipt: Receipt) -> None:
        self.written += 1
        self.stats["images"] += len(shard.rows.labels)
        self.stats["bad"] += len(receipt.bad)
        self.stats["psnr"] += receipt.psnr.sum
        self.stats["seconds"] = time.monotonic() - self.begun
        shard.latents.clear()
        shard.psnr.clear()
        done, total = self.stats["adopted"] + self.written, len(self.group.shards)
        line = f"shard {done} of {total} of {self.group.split}: {describe_stats(self.stats)}"
        end = (
            f" ({self.stats['mode']})"
            if done == total
            else self.pace.left(self.encoded_rows, sum(each.size for each in self.left))
        )
        self.report(done, total, line + end)


def _pieces(rows: RowTable, size: int) -> Iterator[RowTable]:
    for start in range(0, len(rows), size):
        yield rows.take(range(start, min(start + size, len(rows))))


def _loop(
    job: EncodeJob, trained: Field, inner: InnerConfig, side: int, images_in_run: int, device: torch.device
) -> tuple[InnerLoop, str]:
    resolution = (side, side)
    work = (
        float(encode_passes(inner) * forward_flops(trained.config, resolution, trained.image_channels)) * images_in_run
    )
    compiled, why = should_compile(job.compile or inner.compile, work, device)
    return InnerLoop(trained.to(device), inner, resolution, compiled).prepared(images_in_run), why


def describe_stats(stats: Stats) -> str:
    """Return one line: images, rate of this group, shares of the three steps, PSNR, number of bad inputs.

    The rate and the shares are of the group's elapsed time, opening and compiling included. The steps overlap, so the
    shares may add up to more than 100 %, which the line explains.
    """
    if not stats["images"]:
        return f"all {stats['adopted']} shards exist already"
    seconds = max(1e-9, stats["seconds"])
    busy = ", ".join(f"{name} {stats[name] / seconds:.0%}" for name in ("read", "encode", "write"))
    good = stats["images"] - stats["bad"]
    psnr = f", PSNR {stats['psnr'] / good:.2f} dB" if good else ""
    rate = images_per_second(stats["images"] / seconds)
    shares = f"share of the time, in steps that overlap: {busy}"
    return (
        f"{count(stats['images'], 'image')}, {rate} in this group ({shares}){psnr}, {count(stats['bad'], 'bad input')}"
    )


def encode_images(loop: InnerLoop, images: np.ndarray, batch: int) -> tuple[Tensor, Tensor]:
    """Encode uint8 images [n, H, W, ch]; return latents [n, s, s, c] and mean squared errors [n], on the CPU.

    The last batch is padded, so that every call has one shape: one compiled graph, and the same bits for an image
    whatever its position.
    """
    device = _device(loop)
    latents, errors = [], []
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        pixels = as_float(_filled(part, batch), device)
        z = loop.encode(pixels)
        error = loop.errors_at(pixels, z)
        latents.append(z[: len(part)].cpu())
        errors.append(error[: len(part)].cpu())
    return torch.cat(latents), torch.cat(errors)


def errors_of(loop: InnerLoop, images: np.ndarray, z: Tensor, batch: int) -> Tensor:
    """Return the mean squared errors [n] of uint8 images [n, H, W, ch] decoded from latents z, padded like these."""
    device = _device(loop)
    errors = []
    for start in range(0, len(images), batch):
        part, latents = images[start : start + batch], z[start : start + batch].numpy()
        pixels = as_float(_filled(part, batch), device)
        error = loop.errors_at(pixels, torch.from_numpy(_filled(latents, batch)).to(device))
        errors.append(error[: len(part)].cpu())
    return torch.cat(errors)


def _filled(rows: np.ndarray, count: int) -> np.ndarray:
    if len(rows) == count:
        return rows
    filled: np.ndarray = np.zeros((count, *rows.shape[1:]), rows.dtype)
    filled[: len(rows)] = rows
    return filled


def _device(loop: InnerLoop) -> torch.device:
    return next(loop.field.parameters()).device
