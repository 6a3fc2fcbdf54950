"""Kernel distance, precision and recall: against torchmetrics and torch-fidelity, and where the answer is known."""

import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_prc import calculate_precision_recall_full
from torchmetrics.image.kid import poly_mmd

from functa.models.measures import distances
from functa.models.measures.distances import kernel_distance, precision_recall


def rows(count: int, dimensions: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dimensions, generator=generator, dtype=torch.float64) + shift


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_the_kernel_distance_is_torchmetrics_polynomial_mmd(shift: float) -> None:
    x, y = rows(300, 24, 1), rows(300, 24, 2, shift)
    assert kernel_distance(x, y) == pytest.approx(poly_mmd(x, y).item(), rel=1e-9, abs=1e-12)


def test_blocks_of_rows_change_neither_distance_nor_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = rows(100, 6, 1), rows(70, 6, 2, 0.3)
    whole = (kernel_distance(x, y), precision_recall(x, y))
    monkeypatch.setattr(distances, "ROWS", 13)
    assert kernel_distance(x, y) == pytest.approx(whole[0], rel=1e-9)
    assert precision_recall(x, y) == whole[1]


def test_the_kernel_distance_is_unbiased_at_unequal_counts() -> None:
    """Between samples of one distribution its mean is 0 within 4 standard errors; that of the biased one is not."""
    drawn = torch.tensor([kernel_distance(rows(8, 3, 2 * n), rows(5, 3, 2 * n + 1)) for n in range(2000)])
    standard_error = drawn.std() / len(drawn) ** 0.5
    assert drawn.mean().abs() < 4 * standard_error
    own = torch.tensor([((rows(8, 3, 2 * n).square().sum(1) / 3 + 1) ** 3).mean() / 8 for n in range(200)])
    assert own.mean() > 20 * standard_error  # what the diagonal would add


@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_precision_and_recall_are_those_of_a_peer(shift: float) -> None:
    samples, reference = rows(400, 8, 1, shift), 1.4 * rows(300, 8, 2)
    ours = precision_recall(samples, reference)
    assert ours == pytest.approx(calculate_precision_recall_full(samples, reference, 3), abs=1e-6)
    assert 0 < ours[0] < 1 and 0 < ours[1] < 1


def test_precision_sees_what_is_wrong_and_recall_what_is_missing() -> None:
    reference = torch.cat([rows(200, 4, 1), rows(200, 4, 2, 50)])  # two modes
    one_mode, far = rows(200, 4, 3), rows(200, 4, 4, -90)
    precision, recall = precision_recall(one_mode, reference)
    assert precision > 0.9 and 0.3 < recall <= 0.5
    precision, recall = precision_recall(torch.cat([reference[::2], far]), reference)
    assert precision == 0.5 and recall > 0.9
    assert precision_recall(far, reference) == (0, 0)
    assert precision_recall(reference, reference) == (1, 1)


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 rows"):
        kernel_distance(rows(1, 3, 1), rows(9, 3, 2))
    with pytest.raises(ValueError, match="more than 3 rows"):
        precision_recall(rows(3, 3, 1), rows(9, 3, 2))
