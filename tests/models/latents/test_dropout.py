"""Our dropout against what dropout is, and against torch's."""

import pytest
import torch

from functa.models.latents.dropout import Dropout


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_entries_are_dropped_at_the_rate_and_the_others_scaled(p: float, kind: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.full((400, 1000), 3.0, dtype=kind)
    y = Dropout(p)(x)
    assert y.dtype == kind
    dropped = float((y == 0).float().mean())
    assert abs(dropped - p) < 5 * (p * (1 - p) / x.numel()) ** 0.5
    torch.testing.assert_close(y[y != 0].float(), torch.full_like(y[y != 0], 3 / (1 - p)).float(), rtol=8e-3, atol=0)


def test_gradients_pass_where_entries_did() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 50, requires_grad=True)
    y = Dropout(0.4)(x)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.where(y == 0, 0.0, 1 / 0.6))


def test_it_does_nothing_in_evaluation_or_at_zero_and_refuses_what_torchs_does() -> None:
    x = torch.randn(5, 5)
    assert Dropout(0.4).eval()(x) is x
    assert Dropout(0.0)(x) is x
    with pytest.raises(ValueError, match="dropout probability"):
        Dropout(1.5)
