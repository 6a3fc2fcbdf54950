"""A linear probe: how well classes can be read off features by one linear map."""

import numpy as np
import torch
from torch import Tensor


class LinearProbe:
    """Ridge regression of the classes (one against the rest) on features [n, D] and labels int64 [n], in closed form.

    Nothing is drawn and nothing iterates: the same features give the same probe. Raises ValueError for fewer than two
    classes.
    """

    def __init__(self, features: Tensor, labels: np.ndarray) -> None:
        self.classes, numbers = np.unique(labels, return_inverse=True)
        if len(self.classes) < 2:
            raise ValueError(f"a probe needs labels of two classes or more, not of {len(self.classes)}")
        x = features.double()
        self._mean = x.mean(0)
        centred = x - self._mean  # [n, D]
        targets = torch.eye(len(self.classes), dtype=torch.float64)[torch.from_numpy(numbers)]  # [n, K]
        self._bias = targets.mean(0)
        self._weights = _ridge(centred, targets - self._bias)

    def labels_of(self, features: Tensor) -> np.ndarray:
        """Return the class of each row of features [m, D]: int64 [m]."""
        scores = (features.double() - self._mean) @ self._weights + self._bias  # [m, K]
        return self.classes[scores.argmax(1).numpy()]

    def agreement(self, features: Tensor, labels: np.ndarray) -> float:
        """Return the share of the rows [m, D] that the probe takes for their labels [m]."""
        return float((self.labels_of(features) == labels).mean())


RIDGE = 0.01  # of the features' mean variance, for each row


def _ridge(x: Tensor, y: Tensor) -> Tensor:
    """Weights [D, K] of least squares with a penalty, by the smaller of the two systems: D x D or n x n."""
    rows, columns = x.shape
    penalty = (RIDGE * x.square().mean() * rows).clamp(min=torch.finfo(x.dtype).tiny)
    if columns <= rows:
        return torch.linalg.solve(x.T @ x + penalty * torch.eye(columns, dtype=x.dtype), x.T @ y)
    return x.T @ torch.linalg.solve(x @ x.T + penalty * torch.eye(rows, dtype=x.dtype), y)
