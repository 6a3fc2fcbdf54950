"""Parity with an independent JAX implementation: losses, latents and every outer gradient."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from models.config import FieldConfig, InnerConfig
from models.field import Field
from models.inner import InnerLoop

FIXTURES = Path(__file__).parents[1] / "fixtures"


def load(name: str, compiled: bool = False) -> tuple[Field, InnerLoop, Tensor, dict[str, np.ndarray]]:
    arrays = dict(np.load(FIXTURES / f"fixture_{name}.npz"))
    a = json.loads(str(arrays["config"]))
    config = FieldConfig(**{k: a[k] for k in ("spatial", "channels", "width", "depth", "w0")})
    inner = InnerConfig(loss={"mean": "image", "patch": "patch"}[a["loss"]], rates="channel", chunk=500)
    field = Field(config, inner, image_channels=3)
    with torch.no_grad():
        for i, (weight, bias) in enumerate(zip(field.weights, field.biases)):
            weight.copy_(torch.from_numpy(arrays[f"param.w{i}"]))
            bias.copy_(torch.from_numpy(arrays[f"param.b{i}"]))
        for ours, theirs in SHARED.items():
            getattr(field, ours).copy_(torch.from_numpy(arrays[f"param.{theirs}"]))
    resolution = (a["resolution"], a["resolution"])
    return field, InnerLoop(field, inner, resolution, compiled), torch.from_numpy(arrays["images"]), arrays


SHARED = {"modulation_weight": "lam", "modulation_bias": "lam_b", "rates": "lrs"}


def relative(ours: Tensor, theirs: np.ndarray) -> float:
    """Largest difference over the largest value."""
    return float(np.abs(ours.detach().numpy() - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("name", ["vector", "spatial", "patch_loss"])
def test_latents_equal_the_peers(name: str) -> None:
    _, loop, images, arrays = load(name)
    assert relative(loop.encode(images), arrays["z"]) < 1e-5


@pytest.mark.parametrize("name", ["vector", "spatial", "patch_loss"])
def test_loss_and_every_outer_gradient_equal_the_peers(name: str) -> None:
    field, loop, images, arrays = load(name)
    loss = loop.outer_backward(images).mean()
    assert float(loss) == pytest.approx(float(arrays["outer_loss"]), rel=1e-5)
    gradients = {f"w{i}": w.grad for i, w in enumerate(field.weights)}
    gradients |= {f"b{i}": b.grad for i, b in enumerate(field.biases)}
    gradients |= {theirs: getattr(field, ours).grad for ours, theirs in SHARED.items()}
    for key, gradient in gradients.items():
        assert relative(gradient, arrays[f"grad.{key}"]) < 1e-4, key
