"""Sine and cosine from one reduction, against double precision."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functa.models.field.sine import _SineCosine, polynomials, sine_cosine


@pytest.mark.parametrize("limit", [1.0, 30.0, 1e3, 1e4])
def test_polynomials_are_as_close_as_float32_allows(limit: float) -> None:
    x = (torch.rand(200_000, generator=torch.Generator().manual_seed(0)) * 2 - 1) * limit
    sine, cosine = polynomials(x)
    assert (sine.double() - x.double().sin()).abs().max() < 2e-7
    assert (cosine.double() - x.double().cos()).abs().max() < 2e-7


@given(st.floats(-1e4, 1e4, width=32))
@settings(max_examples=300)
def test_they_lie_on_the_unit_circle(x: float) -> None:
    sine, cosine = (float(value) for value in polynomials(torch.tensor(x)))
    assert sine**2 + cosine**2 == pytest.approx(1, abs=5e-7)


def test_at_multiples_of_a_quarter_turn() -> None:
    """The nearest multiple of pi changes there, or is odd."""
    turns = torch.arange(-40, 41)
    sine, cosine = polynomials((turns.double() * (np.pi / 2)).float())
    torch.testing.assert_close(sine, torch.tensor([0.0, 1.0, 0.0, -1.0])[turns % 4], atol=3e-6, rtol=0)
    torch.testing.assert_close(cosine, torch.tensor([1.0, 0.0, -1.0, 0.0])[turns % 4], atol=3e-6, rtol=0)


def test_the_written_derivative_is_that_of_torchs_own_functions() -> None:
    x = torch.linspace(-9, 9, 50, requires_grad=True)
    cotangents = torch.randn(2, 50, generator=torch.Generator().manual_seed(1))
    slopes = []
    for sine, cosine in (sine_cosine(x), _SineCosine.apply(x)):
        slopes.append(torch.autograd.grad((sine * cotangents[0] + cosine * cotangents[1]).sum(), x)[0])
    torch.testing.assert_close(slopes[0], slopes[1], atol=2e-6, rtol=1e-5)
