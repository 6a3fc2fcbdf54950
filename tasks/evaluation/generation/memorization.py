"""Memorisation (App. C.2): each sample's nearest training images, distinct counts by class, and a verdict.

Neighbours are looked for in pixel space, as in the paper (Fig. 5, Table 7). The verdict is not: a sample that repeats
a training image repeats its *reconstruction*, and the error of that hides how close it is. So the nearest images found
in pixel space are compared once more as reconstructions, and test images' reconstructions, which no model was
trained on, show how near an unseen image comes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from functa.models.measures.memorization import (
    Nearest,
    compared_again,
    distinct,
    distinct_expected,
    exact_nearest,
    has_usable_bounds,
    is_memorized,
    isolation,
    repeats,
    same_images,
    shortlist,
)
from functa.storage.functaset.plan import RowTable
from functa.storage.functaset.shards.shard import Shard
from functa.storage.images.source import ImageSplit
from functa.tasks.evaluation.config import MemorizationConfig
from functa.tasks.evaluation.evaluator_input import SILENT, Bench, EvaluationJob, Messages, open_bench, write_arrays
from functa.tasks.evaluation.subset import changed_rows
from functa.tasks.inference.sample import read_slices
from functa.tasks.inputs.latents import PlainRows
from functa.tasks.inputs.pictures import as_uint8, spread

BATCH = 1024  # training images read at a time

SIDE = 32  # pixels; larger images are averaged down to this for the shortlist

KEPT_BYTES = 2 << 30  # of decoded samples; more are decoded again when they are needed

KEPT_RATIOS = 5000  # samples whose isolation is drawn

CLASSES = 100  # more are counted together in metrics.json, and one by one in the report's table alone


@dataclass(frozen=True, eq=False)
class References:
    """Training images whose latents the functaset holds: rows int64 [N] of the pictures, labels int64 [N].

    Their latents are read on request: `positions` int64 [N], ascending, are their rows in `latents`.
    """

    bench: Bench
    rows: np.ndarray
    labels: Tensor
    latents: PlainRows
    positions: np.ndarray

    def images(self, numbers: Tensor) -> Tensor:
        """Return the images of these numbers, [b, H, W, ch]."""
        return self.bench.training.batch(self.rows[numbers.numpy()])

    def vectors(self, numbers: Tensor) -> Tensor:
        """Return the images as vectors [b, D]."""
        return self.images(numbers).flatten(1)

    def reconstructions(self, numbers: Tensor) -> Tensor:
        """Decode their latents, [b, D]; numbers ascend."""
        return self.bench.decode(self.latents.read(self.positions[numbers.numpy()])).flatten(1)

    def thumbnails(self) -> Iterator[Tensor]:
        """Yield all images in parts, reduced: [b, D']."""
        for numbers in torch.arange(len(self.rows)).split(BATCH):
            yield thumbnails(self.images(numbers))


class Decoded:
    """Latents z [n, s, s, c] as images, kept if they fit in memory, else decoded on request."""

    def __init__(self, bench: Bench, z: Tensor) -> None:
        self._bench, self._z = bench, z
        height, width = bench.training.resolution
        fits = 4 * len(z) * height * width * bench.training.channels <= KEPT_BYTES
        self._kept = bench.decode(z) if fits else None

    def images(self, rows: Tensor) -> Tensor:
        """Return the images of these rows, [b, H, W, ch] in [0, 1]."""
        return self._bench.decode(self._z[rows]) if self._kept is None else self._kept[rows]

    def vectors(self, rows: Tensor) -> Tensor:
        """Return the images of these rows as vectors, [b, D]."""
        return self.images(rows).flatten(1)

    def thumbnails(self) -> Tensor:
        """Return all images, reduced: [n, D']."""
        return torch.cat([thumbnails(self.images(rows)) for rows in torch.arange(len(self._z)).split(BATCH)])


def thumbnails(images: Tensor) -> Tensor:
    """Return images [b, H, W, ch] as vectors [b, D'], large ones averaged down to SIDE pixels: for shortlists only."""
    if max(images.shape[1:3]) <= SIDE:
        return images.flatten(1)
    return adaptive_avg_pool2d(images.permute(0, 3, 1, 2), SIDE).flatten(1)


def measure(job: EvaluationJob, messages: Messages = SILENT) -> dict[str, Any]:
    """Measure distinct{}, distinct_expected{}, distinct_sd{}, memorized_share, memorized_share_images, memorized.

    By class: of conditional samples their label, of others that of the nearest training image. The last three are left
    out where test images repeat training images, so that no verdict is possible.
    """
    config, drawn = job.evaluation.memorization, job.samples
    assert config is not None and drawn is not None
    labels = drawn.labels
    bench = open_bench(job)
    references = _references(bench)
    if len(references.rows) < 2:
        messages.warn(
            f"no memorisation: {len(references.rows)} of the training images in {job.functaset} are there as they were "
            f"encoded, and nearest ones need 2; restore the images, or encode again"
        )
        return {}
    z, unseen = torch.from_numpy(read_slices(drawn.slices)), _unseen(bench, config)
    count = len(z)
    decoded = Decoded(bench, torch.cat([z, unseen]))
    candidates = shortlist(decoded.thumbnails().to(bench.device), references.thumbnails()).cpu()
    near = exact_nearest(decoded.vectors, references.vectors, candidates)
    rebuilt = compared_again(decoded.vectors, references.reconstructions, near.rows)
    repeating, in_pixels = _repeating(rebuilt, count), _repeating(near, count)
    chosen = references.labels[near.rows[:count, 0]] if labels is None else torch.tensor(labels)
    table = _distinct_table(near.rows[:count, 0], chosen, references.labels, labels is not None)
    _write(bench, config, references, decoded, near, rebuilt, chosen, repeating, table)
    figures = _distinct_figures(table)
    if repeating is not None:
        figures |= {"memorized_share": repeating.double().mean().item(), "memorized": is_memorized(repeating)}
    if in_pixels is not None:
        figures["memorized_share_images"] = in_pixels.double().mean().item()
    return figures


def _repeating(found: Nearest, count: int) -> Tensor | None:
    """Find which of the first `count`, the samples, repeat a training image; None where the unseen give no bound."""
    samples, unseen = found.distances[:count], found.distances[count:]
    return repeats(samples, unseen) if has_usable_bounds(unseen) else None


def _references(bench: Bench) -> References:
    """Find training images that are encoded and unchanged."""
    latents, split = PlainRows(bench.functaset, "train"), bench.training.split
    pictures, today = ({key: row for row, key in enumerate(keys)} for keys in (bench.training.keys, split.keys))
    rows: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    start = 0
    for shard in latents.shards:
        table, within = shard.table(), shard.rows.tolist()
        there = [row for row in within if table.keys[row] in pictures]
        kept = set(there) - _changed(shard, table, there, split, today)
        for position, row in enumerate(within):
            if row in kept:
                positions.append(start + position)
                rows.append(pictures[table.keys[row]])
                labels.append(int(table.labels[row]))
        start += len(within)
    return References(bench, np.array(rows), torch.tensor(labels), latents, np.array(positions))


def _changed(shard: Shard, table: RowTable, rows: list[int], split: ImageSplit, today: Mapping[str, int]) -> set[int]:
    """Return the rows of a shard whose images have other bytes than were encoded; `today`: row by key."""
    parts = (rows[start : start + BATCH] for start in range(0, len(rows), BATCH))  # images are read for it
    return {row for part in parts for row in changed_rows(shard, table, part, split, today)}


def _unseen(bench: Bench, config: MemorizationConfig) -> Tensor:
    """Read latents of test images: no model has seen them."""
    latents = PlainRows(bench.functaset, "test")
    return latents.read(spread(len(latents), config.null_images))


Table = dict[str, np.ndarray]


def _distinct_table(rows: Tensor, labels: Tensor, training: Tensor, conditional: bool) -> Table:
    """Make Table 7: label (-1: all of these classes together), images, draws, distinct, expected, sd.

    rows int64 [m], the nearest training image of each draw; labels [m], the draws' classes; training [N], the images'.
    Classes without draws or without images are left out, of -1 too: nothing can be expected of them. Draws are even
    within each class of a conditional model, and over all images of another.
    """
    found = []
    for label in labels.unique().tolist():
        mine, images = labels == label, int((training == label).sum())
        if images:
            draws = int(mine.sum())
            found.append((label, images, draws, distinct(rows[mine]), *distinct_expected(images, draws)))
    each = np.array(found, dtype=np.float64).reshape(-1, 6)
    counted = rows[torch.isin(labels, torch.from_numpy(each[:, 0]).long())]
    if conditional:
        images, expected, sd = each[:, 1].sum(), each[:, 4].sum(), np.sqrt(np.square(each[:, 5]).sum())
    else:
        images = len(training)
        expected, sd = distinct_expected(images, len(counted))
    table = np.concatenate([each, [[-1, images, len(counted), distinct(counted), expected, sd]]])
    return dict(zip(("label", "images", "draws", "distinct", "expected", "sd"), table.T, strict=True))


def _distinct_figures(table: Table) -> dict[str, Any]:
    """Return the table's figures by class number, and for "all"."""
    kept = [i for i, label in enumerate(table["label"]) if label < 0 or len(table["label"]) <= CLASSES + 1]
    names = ["all" if table["label"][i] < 0 else str(int(table["label"][i])) for i in kept]
    return {
        "distinct": {name: int(table["distinct"][i]) for name, i in zip(names, kept)},
        "distinct_expected": {name: float(table["expected"][i]) for name, i in zip(names, kept)},
        "distinct_sd": {name: float(table["sd"][i]) for name, i in zip(names, kept)},
    }


def _write(
    bench: Bench,
    config: MemorizationConfig,
    references: References,
    decoded: Decoded,
    near: Nearest,
    rebuilt: Nearest,
    labels: Tensor,
    repeating: Tensor | None,
    table: Table,
) -> None:
    """Write samples, not chosen, beside their nearest, and how isolated samples and unseen images are."""
    shown = torch.from_numpy(spread(len(labels), config.shown))
    marked = torch.zeros(len(labels), dtype=torch.bool) if repeating is None else repeating
    nearest = [as_uint8(references.images(near.rows[shown, k])) for k in range(near.rows.shape[1])]
    ratios = isolation(rebuilt.distances).numpy()
    write_arrays(
        bench.job.output,
        "memorization",
        samples=as_uint8(decoded.images(shown)),
        nearest=np.stack(nearest),  # [k, shown, H, W, ch]
        distances=near.distances[shown].numpy().T,
        labels=labels[shown].numpy(),
        neighbour_labels=references.labels[near.rows[shown]].numpy().T,
        repeating=marked[shown].numpy(),
        same=same_images(rebuilt.distances[len(labels) :]).numpy(),  # [m] of the unseen images
        isolation=ratios[: len(labels)][spread(len(labels), KEPT_RATIOS)],
        isolation_unseen=ratios[len(labels) :],
        **{f"table_{name}": column for name, column in table.items()},
    )
