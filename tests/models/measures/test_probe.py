"""The linear probe: scikit-learn's ridge classifier, and separable classes."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeClassifier

from functa.models.measures.probe import RIDGE, LinearProbe


def classes(rows: int, dimensions: int, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    """Draw overlapping Gaussian classes 3, 5 and 9."""
    drawn = np.random.default_rng(seed)
    labels = drawn.choice([3, 5, 9], rows)
    centres = np.random.default_rng(0).normal(0, 0.3, (10, dimensions))
    return torch.from_numpy(centres[labels] + drawn.normal(0, 1, (rows, dimensions))), labels


@pytest.mark.parametrize(("rows", "dimensions"), [(200, 20), (30, 80)])  # either of the two systems is the smaller one
def test_it_classifies_as_scikit_learn_does(rows: int, dimensions: int) -> None:
    (x, labels), (other, _) = classes(rows, dimensions, 1), classes(500, dimensions, 2)
    penalty = RIDGE * float((x - x.mean(0)).square().mean()) * rows
    peer = RidgeClassifier(alpha=penalty).fit(x.numpy(), labels)
    np.testing.assert_array_equal(LinearProbe(x, labels).labels_of(other), peer.predict(other.numpy()))


def test_classes_that_a_plane_separates_are_all_named() -> None:
    x = torch.cat([torch.randn(50, 6) - 9, torch.randn(50, 6) + 9])
    labels = np.repeat([2, 7], 50)
    probe = LinearProbe(x, labels)
    assert probe.agreement(x + 0.1, labels) == 1 and probe.agreement(x, labels[::-1]) == 0


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="labels of two classes or more, not of 1"):
        LinearProbe(torch.randn(4, 2), np.zeros(4, np.int64))
