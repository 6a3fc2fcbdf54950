"""Does a generative model repeat its training images? Nearest neighbours, distinct counts, a verdict (App. C.2)."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

NEIGHBOURS = 3  # per sample, as in Fig. 5

SHORTLIST = 24  # candidates whose distances are computed exactly

QUERIES = 4096  # rows of a distance matrix at a time

EXACT_NUMBERS = 1 << 24  # float64 numbers at a time

CHANCE = 0.05  # quantile of unseen images: above the 3 % of CIFAR-10's test images that repeat training images

FLAGGED = 0.15  # share of samples from which a model counts as memorising: three times chance, for small test sets

LEAST = 3  # samples below which no share means anything

SAME = 0.01  # distance, of that to another image, at which two images count as one

Fetch = Callable[[Tensor], Tensor]

"""Rows int64 [b] -> images as vectors, float [b, D]."""


@dataclass(frozen=True, eq=False)
class Nearest:
    """Nearest references of n queries: rows int64 [n, k], Euclidean distances float64 [n, k], nearest first."""

    rows: Tensor
    distances: Tensor


def shortlist(queries: Tensor, references: Iterable[Tensor], count: int = SHORTLIST) -> Tensor:
    """The `count` references (or all) nearest to each query by float32 matmuls: int64 [n, count], in no order.

    queries [n, D]; references in parts [b, D], seen once and never held together. Good enough to choose from, and not
    to be read as distances: near-duplicates come out anywhere near zero.
    """
    best = torch.empty(len(queries), 0, device=queries.device)
    rows = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    centre, start = queries.mean(0), 0  # what all have in common would eat the digits of the differences
    queries = queries - centre
    for part in references:
        part = part.to(queries) - centre
        squares = part.square().sum(1)
        found = [
            _smallest(squares - 2 * some @ part.T, start, before, kept, count)
            for some, before, kept in zip(queries.split(QUERIES), best.split(QUERIES), rows.split(QUERIES))
        ]
        best, rows = (torch.cat(parts) for parts in zip(*found))
        start += len(part)
    return rows


def _smallest(distances: Tensor, start: int, before: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The count smallest of distances [b, m], whose columns are rows start, start + 1, ..., and of those before."""
    columns = torch.arange(start, start + distances.shape[1], device=rows.device).expand_as(distances)
    together, numbers = torch.cat([before, distances], 1), torch.cat([rows, columns], 1)
    values, places = together.topk(min(count, together.shape[1]), largest=False)
    return values, numbers.gather(1, places)


def exact_nearest(queries: Fetch, references: Fetch, candidates: Tensor, count: int = NEIGHBOURS) -> Nearest:
    """The `count` nearest of each query's candidates int64 [n, m], by float64 differences; of equals the lower row."""
    candidates = candidates.sort(1).values  # so that a stable sort keeps the lower of two equals first
    n, m = candidates.shape
    size = max(1, EXACT_NUMBERS // max(1, m * queries(torch.zeros(1, dtype=torch.int64)).shape[1]))
    rows, distances = [], []
    for some in torch.arange(n).split(size):
        wanted = candidates[some]
        unique, places = wanted.unique(return_inverse=True)
        differences = references(unique).double()[places] - queries(some).double()[:, None]  # [b, m, D]
        found, order = differences.square().sum(-1).sqrt().sort(dim=1, stable=True)
        rows.append(wanted.gather(1, order[:, :count]))
        distances.append(found[:, :count])
    return Nearest(torch.cat(rows), torch.cat(distances))


def compared_again(queries: Fetch, references: Fetch, rows: Tensor) -> Nearest:
    """The references rows int64 [n, k] of each query, nearest first by other vectors of both; of equals the lower row.

    References are fetched in ascending order, and not once for each query: they may lie in a store of which one part
    is in memory at a time. Queries are fetched up to k times.
    """
    rows = rows.sort(1).values
    n, k = rows.shape
    named, distances = rows.flatten(), torch.empty(n * k, dtype=torch.float64)
    size = max(1, EXACT_NUMBERS // max(1, queries(torch.zeros(1, dtype=torch.int64)).shape[1]))
    for pairs in named.argsort(stable=True).split(size):
        wanted, theirs = named[pairs].unique(return_inverse=True)
        asking, ours = (pairs // k).unique(return_inverse=True)
        differences = references(wanted).double()[theirs] - queries(asking).double()[ours]  # [b, D]
        distances[pairs] = differences.square().sum(-1).sqrt()
    found, order = distances.reshape(n, k).sort(dim=1, stable=True)
    return Nearest(rows.gather(1, order), found)


def distinct_expected(images: int, draws: int) -> tuple[float, float]:
    """Mean and sd of how many different images `draws` independent even draws out of `images` give (Table 7).

    Var = n(n-1)(1-2/n)^m + n(1-1/n)^m - n^2(1-1/n)^(2m). The slots are not independent: for n = m = 5,000 the sd is
    22.05, not the binomial 34 of the paper. Raises ValueError for no images.
    """
    if images < 1 or draws < 0:
        raise ValueError(f"{draws} draws from {images} images: a class needs at least one image")
    n, missed = float(images), (1 - 1 / images) ** draws
    variance = n * (n - 1) * (1 - 2 / n) ** draws + n * missed - n**2 * missed**2
    return n * (1 - missed), math.sqrt(max(0.0, variance))


def distinct(rows: Tensor) -> int:
    """Return how many different training images rows int64 [m] name."""
    return len(rows.unique())


def isolation(distances: Tensor) -> Tensor:
    """Distance to the nearest over that to the last of k references, [n, k] -> [n] in [0, 1]; 1 where all are 0.

    Free of scale: blurred images lie close to many training images, a copy close to one.
    """
    far = distances[:, -1]
    return torch.where(far > 0, distances[:, 0] / far, 1.0)


def repeats(samples: Tensor, unseen: Tensor) -> Tensor:
    """Return which samples repeat a training image: bool [n], from distances [n, k] to their nearest training images.

    unseen [m, k]: those of images of the same kind that no model has seen, which set the bounds. A sample counts when
    it is nearer *and* more isolated than CHANCE of these; so of a perfect generator's samples at most CHANCE do, and
    blurred samples, which are near but not isolated, do not. An image that the training set holds k times escapes.
    Meaningful only if the bounds are usable (has_usable_bounds).
    """
    near, isolated = _bounds(unseen)
    return (samples[:, 0] < near) & (isolation(samples) < isolated)


def has_usable_bounds(unseen: Tensor) -> bool:
    """Return whether `repeats` can distinguish copies from fresh images: its bounds are not about 0.

    They are about 0 where more than CHANCE of the unseen images repeat training images (same_images).
    """
    near, isolated = _bounds(unseen)
    return bool(near > SAME * _typical(unseen)) and bool(isolated > SAME)


def same_images(unseen: Tensor) -> Tensor:
    """Return which unseen images repeat a training image, bool [m], from distances [m, k] to their nearest."""
    return (unseen[:, 0] <= SAME * _typical(unseen)) | (isolation(unseen) <= SAME)


def _bounds(unseen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bounds of the distance to the nearest training image and of the isolation."""
    return unseen[:, 0].quantile(CHANCE), isolation(unseen).quantile(CHANCE)


def _typical(unseen: Tensor) -> Tensor:
    """Distance to a training image that is near, but another one."""
    return unseen[:, -1].median()


def is_memorized(repeating: Tensor) -> bool:
    """Return whether so many samples repeat a training image, bool [n], that the model counts as memorising."""
    return int(repeating.sum()) >= max(LEAST, FLAGGED * len(repeating))
