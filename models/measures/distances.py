"""The distance of a set of samples from a reference set, by features [n, D]: kernel distance, precision and recall.

The Frechet distance, in models/measures/metrics.py, needs moments alone; these need the features of a subset.
"""

import torch
from torch import Tensor

ROWS = 1024  # rows of a product at a time: bounds memory


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """Unbiased squared MMD of features [m, D] and [n, D] with the kernel (x.y / D + 1)^3, in float64 (may be negative).

    Binkowski et al. 2018; "KID" on Inception features only. torchmetrics' poly_mmd is the same for m = n, in one piece.
    Raises ValueError below two rows.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError(f"a kernel distance needs at least 2 rows of features on each side, not {len(x)} and {len(y)}")
    x, y = x.double(), y.double()
    return _own(x) + _own(y) - 2 * _kernel_sum(x, y) / (len(x) * len(y))


def _own(x: Tensor) -> float:
    """Mean kernel of two different rows."""
    diagonal = (x.square().sum(1) / x.shape[1] + 1) ** 3  # [n]
    return (_kernel_sum(x, x) - diagonal.sum().item()) / (len(x) * (len(x) - 1))


def _kernel_sum(x: Tensor, y: Tensor) -> float:
    return sum(((part @ y.T / x.shape[1] + 1) ** 3).sum().item() for part in x.split(ROWS))


def precision_recall(samples: Tensor, reference: Tensor, neighbour: int = 3) -> tuple[float, float]:
    """Shares of the samples within the reference's manifold, and of the reference within the samples', in float64.

    Features [m, D] and [n, D]. A set's manifold: balls around its rows, each reaching to the row's k-th nearest other
    row (Kynkaanniemi et al. 2019, k = 3). Raises ValueError where a set has no k other rows.
    """
    fewest = min(len(samples), len(reference))
    if fewest <= neighbour:
        raise ValueError(f"precision and recall need more than {neighbour} rows of features on each side, not {fewest}")
    centre = reference.double().mean(0)  # distances by products lose least around zero
    a, b = samples.double() - centre, reference.double() - centre
    return _share_within(a, b, _radii(b, neighbour)), _share_within(b, a, _radii(a, neighbour))


def _radii(x: Tensor, neighbour: int) -> Tensor:
    """Distance of each row [n, D] to its k-th nearest other: [n]."""
    # The nearest of all is the row itself.
    return torch.cat([torch.cdist(part, x).kthvalue(neighbour + 1).values for part in x.split(ROWS)])


def _share_within(x: Tensor, centres: Tensor, radii: Tensor) -> float:
    within = [(torch.cdist(part, centres) <= radii).any(1) for part in x.split(ROWS)]
    return torch.cat(within).double().mean().item()
