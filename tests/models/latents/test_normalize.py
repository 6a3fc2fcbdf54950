"""Normalisation: moments against a pass over the latents, and its inverse."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from functa.models.config import NormalizationConfig
from functa.models.latents.normalize import Normalizer, normalizer

AXES = {"scalar": (0, 1, 2, 3), "vector": (0, 1, 2), "array": (0,)}


def latents(seed: int = 0) -> np.ndarray:
    """[64, 3, 3, 5] float64 with means and deviations that differ by element."""
    random = np.random.default_rng(seed)
    centre, spread = random.normal(size=(3, 3, 5)), random.uniform(0.01, 0.1, (3, 3, 5))
    return centre + spread * random.normal(size=(64, 3, 3, 5))


def build(kind: str, z: np.ndarray, gamma: float = 1.0) -> Normalizer:
    return normalizer(NormalizationConfig(kind=kind, gamma=gamma), z.mean(0), z.var(0))


@pytest.mark.parametrize("kind", AXES)
def test_moments_equal_those_of_one_pass_over_the_latents(kind: str) -> None:
    z = latents()
    built = build(kind, z, gamma=2.5)
    keep = {"axis": AXES[kind], "keepdims": True}
    np.testing.assert_allclose(built.mean, z.mean(**keep)[0], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(built.scale, 2.5 * z.std(**keep)[0], rtol=1e-6)
    assert built.mean.dtype == built.scale.dtype == torch.float32


@pytest.mark.parametrize("kind", AXES)
def test_normalised_latents_have_mean_0_and_sd_1_over_gamma(kind: str) -> None:
    z = latents()
    x = build(kind, z, gamma=2.0).normalize(torch.from_numpy(z).float()).numpy()
    np.testing.assert_allclose(x.mean(AXES[kind]), 0, atol=1e-5)
    np.testing.assert_allclose(x.std(AXES[kind]), 0.5, rtol=1e-4)


@settings(deadline=None, max_examples=50)
@given(
    z=hnp.arrays(np.float32, (4, 2, 2, 3), elements=st.floats(-8, 8, width=32)),
    kind=st.sampled_from(list(AXES)),
    gamma=st.floats(0.01, 100),
)
def test_denormalize_inverts_normalize(z: np.ndarray, kind: str, gamma: float) -> None:
    built = build(kind, z.astype(np.float64), gamma)
    x = built.normalize(torch.from_numpy(z))
    assert torch.isfinite(x).all()
    np.testing.assert_allclose(built.denormalize(x), z, rtol=1e-5, atol=1e-5)


def test_an_element_that_never_varies_becomes_zero() -> None:
    z = latents()
    z[..., 2] = 0.3
    z[..., 3] = 0
    var = z.var(0)
    var[..., 2] = 1e-20  # what merging float64 sums leaves of a constant
    built = normalizer(NormalizationConfig(kind="array"), z.mean(0), var)
    x = built.normalize(torch.from_numpy(z).float())
    assert (built.scale[..., 2:4] == 1).all()
    assert x[..., 2:4].abs().max() < 1e-6


def test_state_survives_json_bit_for_bit() -> None:
    built = build("array", latents())
    again = Normalizer.from_state(json.loads(json.dumps(built.state())))
    assert torch.equal(again.mean, built.mean)
    assert torch.equal(again.scale, built.scale)
    moved = again.to("cpu")
    assert torch.equal(moved.scale, built.scale)


@pytest.mark.parametrize(
    ("mean", "var", "fault"),
    [
        (np.zeros(3), np.ones(3), r"\[s, s, c\]"),
        (np.zeros((2, 2, 3)), np.ones((2, 2, 4)), r"\[s, s, c\]"),
        (np.full((2, 2, 3), np.nan), np.ones((2, 2, 3)), "finite"),
        (np.zeros((2, 2, 3)), -np.ones((2, 2, 3)), "negative"),
    ],
)
def test_what_is_no_moments_is_refused(mean: np.ndarray, var: np.ndarray, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        normalizer(NormalizationConfig(), mean, var)
