"""Load the JAX peer (jax_functa.py, an unchanged copy) as a module, and its parameters as one of our fields."""

import argparse
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from functa.models.config import FieldConfig, InnerConfig
from functa.models.field.field import Field

LOSS = {"image": "mean", "patch": "patch"}


def load_peer() -> ModuleType:
    """Import the peer's module. Raises SystemExit if jax is not installed."""
    try:
        import jax  # noqa: F401
    except ImportError:
        raise SystemExit("the peer needs jax: make bench-install") from None
    spec = importlib.util.spec_from_file_location("jax_functa", Path(__file__).with_name("jax_functa.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def peer_arguments(config: dict[str, Any]) -> argparse.Namespace:
    """Return the peer's command line of this config, as a namespace."""
    names = ("spatial", "channels", "width", "depth", "w0", "resolution", "batch")
    return argparse.Namespace(**{name: config[name] for name in names}, loss=LOSS[config["loss"]], seed=0)


def our_field(config: dict[str, Any], inner: InnerConfig, arrays: dict[str, np.ndarray]) -> Field:
    """Return a field of ours with the peer's parameters, saved as w0, w1, ..., b0, ..., lam, lam_b, lrs."""
    shape = FieldConfig(**{name: config[name] for name in ("spatial", "channels", "width", "depth", "w0")})
    field = Field(shape, inner, image_channels=3)
    with torch.no_grad():
        for i, (weight, bias) in enumerate(zip(field.weights, field.biases)):
            weight.copy_(torch.from_numpy(arrays[f"w{i}"]))
            bias.copy_(torch.from_numpy(arrays[f"b{i}"]))
        for ours, theirs in (("modulation_weight", "lam"), ("modulation_bias", "lam_b"), ("rates", "lrs")):
            getattr(field, ours).copy_(torch.from_numpy(arrays[theirs]))
    return field
