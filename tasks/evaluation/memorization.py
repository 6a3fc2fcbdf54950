"""Memorisation (App. C.2): each sample's nearest training images, distinct counts by class, and a verdict.

Neighbours are looked for in pixel space, as in the paper (Fig. 5, Table 7). The verdict is not: a sample that repeats
a training image repeats its *reconstruction*, and the error of that hides how close it is. So the nearest images found
in pixel space are compared once more as reconstructions, and test images' reconstructions, which nobody trained on,
say how near an unseen image comes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from models.memorization import (
    Nearest,
    distinct,
    distinct_expected,
    exact_nearest,
    is_memorized,
    isolation,
    repeats,
    shortlist,
)
from storage.errors import StorageError
from storage.plans import row_id
from tasks.evaluation.job import Bench, EvaluationJob, as_uint8, open_bench, write_arrays
from tasks.sample import read_slices
from tasks.training.latents import load_split
from tasks.training.pictures import spread

BATCH = 1024  # training images read at a time
SIDE = 32  # pixels; larger images are averaged down to this for the shortlist
KEPT_BYTES = 2 << 30  # of decoded samples; more are decoded again when they are needed
KEPT_RATIOS = 5000  # samples whose isolation is drawn
CLASSES = 100  # more are counted together in metrics.json, and one by one in the report's table alone


@dataclass(frozen=True, eq=False)
class References:
    """The training images that the latents z [N, s, s, c] are of: rows of `pictures`, labels int64 [N]."""

    bench: Bench
    rows: np.ndarray
    z: Tensor
    labels: Tensor

    def images(self, numbers: Tensor) -> Tensor:
        """[b, H, W, ch]"""
        return self.bench.training.batch(self.rows[numbers.numpy()])

    def vectors(self, numbers: Tensor) -> Tensor:
        """The images as vectors [b, D]."""
        return self.images(numbers).flatten(1)

    def reconstructions(self, numbers: Tensor) -> Tensor:
        """What the field makes of their latents, [b, D]."""
        return self.bench.decode(self.z[numbers]).flatten(1)

    def thumbnails(self) -> Iterator[Tensor]:
        """All of them in parts, small: [b, D']."""
        for numbers in torch.arange(len(self.rows)).split(BATCH):
            yield thumbnails(self.images(numbers))


class Decoded:
    """Latents z [n, s, s, c] as images; kept where they fit, else decoded when asked for."""

    def __init__(self, bench: Bench, z: Tensor) -> None:
        self._bench, self._z = bench, z
        height, width = bench.training.resolution
        fits = 4 * len(z) * height * width * bench.training.channels <= KEPT_BYTES
        self._kept = bench.decode(z) if fits else None

    def images(self, rows: Tensor) -> Tensor:
        """[b, H, W, ch] in [0, 1]."""
        return self._bench.decode(self._z[rows]) if self._kept is None else self._kept[rows]

    def vectors(self, rows: Tensor) -> Tensor:
        """[b, D]"""
        return self.images(rows).flatten(1)

    def thumbnails(self) -> Tensor:
        """All of them, small: [n, D']."""
        return torch.cat([thumbnails(self.images(rows)) for rows in torch.arange(len(self._z)).split(BATCH)])


def thumbnails(images: Tensor) -> Tensor:
    """Images [b, H, W, ch] as vectors [b, D'], larger ones averaged down to SIDE pixels: to shortlist, not to judge."""
    if max(images.shape[1:3]) <= SIDE:
        return images.flatten(1)
    return adaptive_avg_pool2d(images.permute(0, 3, 1, 2), SIDE).flatten(1)


def measure(job: EvaluationJob, slices: list[str], labels: list[int] | None) -> dict[str, Any]:
    """distinct{}, distinct_expected{}, distinct_sd{}, memorized_share, memorized_share_images, memorized.

    By class: of conditional samples their label, of others that of the nearest training image.
    """
    bench = open_bench(job)
    references = _references(bench)
    z, unseen = torch.from_numpy(read_slices(slices)), _unseen(bench)
    count = len(z)
    decoded = Decoded(bench, torch.cat([z, unseen]))
    candidates = shortlist(decoded.thumbnails().to(bench.device), references.thumbnails()).cpu()
    near = exact_nearest(decoded.vectors, references.vectors, candidates)
    rebuilt = exact_nearest(decoded.vectors, references.reconstructions, near.rows)
    repeating = {
        name: repeats(found.distances[:count], found.distances[count:])
        for name, found in (("images", near), ("reconstructions", rebuilt))
    }
    chosen = references.labels[near.rows[:count, 0]] if labels is None else torch.tensor(labels)
    table = _distinct_table(near.rows[:count, 0], chosen, references.labels, labels is not None)
    _write(job, references, decoded, near, rebuilt, chosen, repeating["reconstructions"], table)
    return {
        **_distinct_figures(table),
        "memorized_share": repeating["reconstructions"].double().mean().item(),
        "memorized_share_images": repeating["images"].double().mean().item(),
        "memorized": is_memorized(repeating["reconstructions"]),
    }


def _references(bench: Bench) -> References:
    """Training images that are encoded and still there. Raises StorageError where fewer than two are."""
    stored = bench.functaset.load("train")
    places = {row_id(key): row for row, key in enumerate(bench.training.keys)}
    plain = [row for row in np.flatnonzero(stored.augmentation == 0) if bytes(stored.ids[row]) in places]
    if len(plain) < 2:
        raise StorageError(
            f"{bench.job.functaset}: {len(plain)} of its training images are still there, and nearest ones need 2: "
            "restore the images"
        )
    rows = np.array([places[bytes(stored.ids[row])] for row in plain])
    z = torch.from_numpy(stored.dequantized(np.array(plain)))
    return References(bench, rows, z, torch.from_numpy(stored.labels[plain].astype(np.int64)))


def _unseen(bench: Bench) -> Tensor:
    """Latents of test images: no model has seen them."""
    z = load_split(bench.functaset, "test").z
    return z[torch.from_numpy(spread(len(z), bench.job.evaluation.memorization.null_images))]


Table = dict[str, np.ndarray]


def _distinct_table(rows: Tensor, labels: Tensor, training: Tensor, conditional: bool) -> Table:
    """Table 7: label (-1: all classes together), images, draws, distinct, expected, sd; classes without draws left out.

    rows int64 [m], the nearest training image of each draw; labels [m], the draws' classes; training [N], the images'.
    Draws are even within each class of a conditional model, and over all images of another.
    """
    found = []
    for label in labels.unique().tolist():
        mine, images = labels == label, int((training == label).sum())
        if images:
            draws = int(mine.sum())
            found.append((label, images, draws, distinct(rows[mine]), *distinct_expected(images, draws)))
    each = np.array(found, dtype=np.float64).reshape(-1, 6)
    if conditional:
        expected, sd = each[:, 4].sum(), np.sqrt(np.square(each[:, 5]).sum())
    else:
        expected, sd = distinct_expected(len(training), len(rows))
    table = np.concatenate([each, [[-1, len(training), len(rows), distinct(rows), expected, sd]]])
    return dict(zip(("label", "images", "draws", "distinct", "expected", "sd"), table.T, strict=True))


def _distinct_figures(table: Table) -> dict[str, Any]:
    """By class number, and "all"."""
    kept = [i for i, label in enumerate(table["label"]) if label < 0 or len(table["label"]) <= CLASSES + 1]
    names = ["all" if table["label"][i] < 0 else str(int(table["label"][i])) for i in kept]
    return {
        "distinct": {name: int(table["distinct"][i]) for name, i in zip(names, kept)},
        "distinct_expected": {name: float(table["expected"][i]) for name, i in zip(names, kept)},
        "distinct_sd": {name: float(table["sd"][i]) for name, i in zip(names, kept)},
    }


def _write(
    job: EvaluationJob,
    references: References,
    decoded: Decoded,
    near: Nearest,
    rebuilt: Nearest,
    labels: Tensor,
    repeating: Tensor,
    table: Table,
) -> None:
    """Samples spread over all, without any choice, beside their nearest; how isolated samples and unseen images are."""
    shown = torch.from_numpy(spread(len(labels), job.evaluation.memorization.shown))
    nearest = [as_uint8(references.images(near.rows[shown, k])) for k in range(near.rows.shape[1])]
    ratios = isolation(rebuilt.distances).numpy()
    write_arrays(
        job.output,
        "memorization",
        samples=as_uint8(decoded.images(shown)),
        nearest=np.stack(nearest),  # [k, shown, H, W, ch]
        distances=near.distances[shown].numpy().T,
        labels=labels[shown].numpy(),
        neighbour_labels=references.labels[near.rows[shown]].numpy().T,
        repeating=repeating[shown].numpy(),
        isolation=ratios[: len(labels)][spread(len(labels), KEPT_RATIOS)],
        isolation_unseen=ratios[len(labels) :],
        **{f"table_{name}": column for name, column in table.items()},
    )
