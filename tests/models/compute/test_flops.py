"""FLOPs against closed forms, and the rate of a device by a clock that is set by hand."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from functa.models.compute.flops import MATMUL_SIDE, matmul_rate
from functa.models.config import ClassifierConfig, DenoiserConfig
from functa.models.latents.classifier import build_classifier
from functa.models.latents.denoiser import build_denoiser
from tests.helpers.forward_flops import forward_flops


def test_a_multiply_add_counts_two() -> None:
    layers = lambda: nn.Sequential(nn.Linear(8, 4), nn.SiLU(), nn.Linear(4, 2))  # noqa: E731
    assert forward_flops(layers, [torch.empty(3, 8)]) == 2 * 3 * (8 * 4 + 4 * 2)
    convolution = lambda: nn.Conv2d(5, 7, 3, padding=1)  # noqa: E731
    assert forward_flops(convolution, [torch.empty(2, 5, 6, 6)]) == 2 * 2 * 36 * 5 * 7 * 9


def test_a_transformers_flops_are_its_matrices_and_its_attention() -> None:
    width, depth, tokens, batch = 32, 3, 16, 5
    config = ClassifierConfig(width=width, depth=depth, heads=4, mlp_ratio=2.0)
    counted = forward_flops(lambda: build_classifier(config, (4, 4, 6), 10), [torch.empty(batch, 4, 4, 6)])
    block = 2 * tokens * (4 * width**2 + 4 * width**2) + 2 * 2 * tokens**2 * width
    assert counted == batch * (depth * block + 2 * tokens * 6 * width + 2 * width * 10)


def test_flops_of_a_forward_pass_of_two_models_of_table_6() -> None:
    """GFLOP of one forward pass: 1.74 of the unconditional 8x8x16 UNet, 9.84 of the linear row's."""
    t = torch.zeros(1, dtype=torch.int64)
    for blocks, multipliers, attention, gigaflops in ((1, (1, 1), (4,), 1.74), (2, (2, 2), (), 9.84)):
        config = DenoiserConfig(channels=320, multipliers=multipliers, blocks=blocks, attention=attention)
        counted = forward_flops(lambda c=config: build_denoiser(c, (8, 8, 16), None), [torch.empty(1, 8, 8, 16), t])  # type: ignore[misc]
        assert counted / 1e9 == pytest.approx(gigaflops, abs=0.01)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_rate_is_that_of_the_fastest_of_three_products(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is set by hand: 3, 1 and 2 seconds; the product that loads the library is not timed."""
    times = iter([0.0, 0.0, 3.0, 3.0, 4.0, 4.0, 6.0, 6.0])
    monkeypatch.setitem(MATMUL_SIDE, "cpu", 64)
    monkeypatch.setattr("functa.models.compute.flops.time", SimpleNamespace(perf_counter=lambda: next(times)))
    assert matmul_rate(torch.device("cpu"), precision) == 2 * 64**3 / 1.0
