"""Parity with an independent JAX implementation: losses, latents and every outer gradient."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.peer import our_field
from functa.models.compute.compilation import has_compiler
from functa.models.config import FieldConfig, InnerConfig
from functa.models.field.field import Field
from functa.models.field.inner import InnerLoop

FIXTURES = Path(__file__).parents[2] / "fixtures"


def load(name: str, compiled: bool = False) -> tuple[Field, InnerLoop, Tensor, dict[str, np.ndarray]]:
    arrays = dict(np.load(FIXTURES / f"fixture_{name}.npz"))
    a = json.loads(str(arrays["config"]))
    inner = InnerConfig(loss={"mean": "image", "patch": "patch"}[a["loss"]], rates="channel", chunk=500)
    field = our_field(a, inner, {k.removeprefix("param."): v for k, v in arrays.items() if k.startswith("param.")})
    resolution = (a["resolution"], a["resolution"])
    return field, InnerLoop(field, inner, resolution, compiled), torch.from_numpy(arrays["images"]), arrays


SHARED = {"modulation_weight": "lam", "modulation_bias": "lam_b", "rates": "lrs"}


def relative(ours: Tensor, theirs: np.ndarray) -> float:
    """Largest difference over the largest value."""
    return float(np.abs(ours.detach().numpy() - theirs).max() / np.abs(theirs).max())


needs_compiler = pytest.mark.skipif(not has_compiler(torch.device("cpu")), reason="no C++ compiler or Python.h here")
# Compiling takes about a minute each.
EAGER = [pytest.param(name, False, id=f"{name}-eager") for name in ("vector", "spatial", "patch_loss")]
COMPILED = [
    pytest.param("patch_loss", True, id="patch_loss-compiled", marks=[needs_compiler, pytest.mark.slow]),
    pytest.param("vector", True, id="vector-compiled", marks=[needs_compiler, pytest.mark.slow]),
    pytest.param("spatial", True, id="spatial-compiled", marks=[needs_compiler, pytest.mark.slow]),
]


@pytest.fixture(autouse=True)
def two_cores() -> Iterator[None]:
    """Give torch two threads: compiled code runs on as many cores, and a test process may have only one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("name", "compiled"), EAGER + COMPILED)
def test_loss_latents_and_every_outer_gradient_equal_the_peers(name: str, compiled: bool) -> None:
    field, loop, images, arrays = load(name, compiled)
    assert relative(loop.encode(images), arrays["z"]) < 1e-5
    loss = loop.outer_backward(images).mean()
    assert float(loss) == pytest.approx(float(arrays["outer_loss"]), rel=1e-5)
    gradients = {f"w{i}": w.grad for i, w in enumerate(field.weights)}
    gradients |= {f"b{i}": b.grad for i, b in enumerate(field.biases)}
    gradients |= {theirs: getattr(field, ours).grad for ours, theirs in SHARED.items()}
    for key, gradient in gradients.items():
        assert relative(gradient, arrays[f"grad.{key}"]) < 1e-4, key


@needs_compiler
def test_a_compiled_encoding_equals_the_eager_one() -> None:
    """The quick one of those below."""
    inner = InnerConfig(steps=2)
    field = Field(FieldConfig(spatial=2, channels=4, width=16, depth=2), inner, 1, seed=1)
    images = torch.rand(4, 8, 8, 1, generator=torch.Generator().manual_seed(0))
    eager, built = (InnerLoop(field, inner, (8, 8), compiled).encode(images) for compiled in (False, True))
    torch.testing.assert_close(built, eager, rtol=1e-4, atol=1e-6)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    "variant", [{}, {"interpolation": "bilinear"}, {"kernel": 3, "spatial": 4}, {"checkpoint": True}], ids=str
)
def test_compiled_encoding_and_gradients_equal_eager_ones(variant: dict[str, Any]) -> None:
    """Whole images, which no fixture covers, and the latents after each step too."""
    inner = InnerConfig(checkpoint=variant.get("checkpoint", False), rates_init=(0.05, 0.2))
    sizes = {"spatial": 2, "channels": 6, "width": 32, "depth": 4}
    config = FieldConfig(**sizes | {k: v for k, v in variant.items() if k != "checkpoint"})
    images = torch.rand(4, 8, 8, 3, generator=torch.Generator().manual_seed(0))
    results = []
    for compiled in (False, True):
        field = Field(config, inner, 3, seed=1, resolution=(8, 8))
        loop = InnerLoop(field, inner, (8, 8), compiled)
        errors = loop.outer_backward(images)
        results.append([loop.encode(images), loop.by_step(images), errors, *(p.grad for p in field.parameters())])
    for eager, built in zip(*results):
        torch.testing.assert_close(built, eager, rtol=1e-4, atol=1e-6)


@needs_compiler
@pytest.mark.slow
def test_cores_side_by_side_change_no_bit_from_run_to_run() -> None:
    inner = InnerConfig(rates="element", chunk=64)
    images = torch.rand(8, 8, 8, 3, generator=torch.Generator().manual_seed(0))
    runs = []
    for _ in range(3):
        field = Field(FieldConfig(spatial=2, channels=6, width=32, depth=4), inner, 3, seed=1)
        loop = InnerLoop(field, inner, (8, 8), compiled=True)
        errors = loop.outer_backward(images)
        runs.append([loop.encode(images), errors, *(p.grad for p in field.parameters())])
    for first, second, third in zip(*runs):
        assert torch.equal(first, second)
        assert torch.equal(first, third)
