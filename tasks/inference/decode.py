"""Decode latents to PNG files: rows of a functaset or samples, batch by batch, so that memory holds one batch."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from functa.models.compute.device import choose_device
from functa.models.field.inner import decode
from functa.storage.errors import StorageError
from functa.storage.functaset.functaset import Functaset
from functa.storage.readers.shards import SplitShards
from functa.tasks.inference.png import prepare_folder, write_images
from functa.tasks.inputs.pictures import as_uint8
from functa.tasks.trained import field_of

SAMPLE_BATCH = 256

FIRST_ROWS = 16  # decoded where no others are asked for

DECODED_NUMBERS = 1 << 24  # pixels times channels that are decoded at a time

Decode = Callable[[Tensor], Iterator[np.ndarray]]

Progress = Callable[[int, int], None]  # (images done, images in all)


def silent(done: int, total: int) -> None:
    """Report nothing."""


def decode_rows(
    uri: str,
    split: str,
    rows: tuple[int, int] | None,
    resolution: int | None,
    out: Path,
    progress: Progress = silent,
    scale: int = 1,
) -> int:
    """Write the rows' images as PNG files named by row; return how many. Reads only the shards of these rows.

    rows: from the first to before the second; None: the first 16, or all where there are fewer. scale: times as many
    pixels a side as `resolution`, or as the images have.
    """
    functaset = Functaset.open(uri)
    present = functaset.rows(split)
    if not present:
        raise StorageError(f"{uri}: split '{split}' has no rows; decode another split")
    start, stop = rows or (0, min(FIRST_ROWS, present))
    if stop > present:
        raise StorageError(
            f"{uri}: split '{split}' has {present} rows, {start}:{stop} is beyond them; choose rows below {present}"
        )
    decoded = decoder(functaset, resolution, scale=scale)
    prepare_folder(out)
    row = start
    for z in _read_rows(functaset, split, start, stop):
        for images in decoded(torch.from_numpy(z)):
            write_images(images, out, f"{split}-", row)
            row += len(images)
            progress(row - start, stop - start)
    return row - start


def _read_rows(functaset: Functaset, split: str, start: int, stop: int) -> Iterator[np.ndarray]:
    """Yield float32 [n, s, s, c] of each shard that has some of the rows, in the store's order."""
    shards = SplitShards(functaset, split)
    first = 0
    for shard in shards.shards:
        here = slice(max(0, start - first), max(0, stop - first))
        if first < stop and first + shard.count > start:
            z = shards.read(shard, ids=False).z[here]
            yield shard.fragment.dequantized(z) if shards.quantizers else z
        first += shard.count


def decoder(functaset: Functaset, resolution: int | None, device: str = "auto", scale: int = 1) -> Decode:
    """Return a decoder of latents [n, s, s, c] into images uint8 [m, H, W, ch], some at a time. Raises StorageError."""
    field, _, fitted = field_of(functaset)
    side = scale * (fitted if resolution is None else resolution)
    try:
        field.check_resolution((side, side))
    except ValueError as error:
        raise StorageError(f"resolution {side}: {error}") from None
    if side % field.config.spatial:
        raise StorageError(
            f"resolution {side}: is not divisible into {field.config.spatial} latent positions a side; "
            f"choose a multiple of {field.config.spatial}"
        )
    target = choose_device(device)
    field = field.to(target)
    size = min(SAMPLE_BATCH, max(1, DECODED_NUMBERS // (side * side * field.image_channels)))

    def decoded(z: Tensor) -> Iterator[np.ndarray]:
        for part in z.split(size):
            yield as_uint8(decode(field, part.to(target), (side, side)).cpu())

    return decoded
