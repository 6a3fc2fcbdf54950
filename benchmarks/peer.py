"""The JAX peer (jax_functa.py, kept as it came) as a module: its functions, and its parameters as one of our fields."""

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
    """The peer's module. Raises SystemExit where jax is not installed."""
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
    """The peer's own command line, as a namespace."""
    names = ("spatial", "channels", "width", "depth", "w0", "resolution", "batch")
    return argparse.Namespace(**{name: config[name] for name in names}, loss=LOSS[config["loss"]], seed=0)


def our_field(config: dict[str, Any], inner: InnerConfig, arrays: dict[str, np.ndarray]) -> Field:
    """The peer's parameters, saved as w0, w1, ..., b0, ..., lam, lam_b, lrs, in a field of ours."""
    shape = FieldConfig(**{name: config[name] for name in ("spatial", "channels", "width", "depth", "w0")})
    field = Field(shape, inner, image_channels=3)
    with torch.no_grad():
        for i, (weight, bias) in enumerate(zip(field.weights, field.biases)):
            weight.copy_(torch.from_numpy(arrays[f"w{i}"]))
            bias.copy_(torch.from_numpy(arrays[f"b{i}"]))
        for ours, theirs in (("modulation_weight", "lam"), ("modulation_bias", "lam_b"), ("rates", "lrs")):
            getattr(field, ours).copy_(torch.from_numpy(arrays[theirs]))
    return field
