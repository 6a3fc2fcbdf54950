"""Encoding and outer step beside the JAX peer: what they print, and that they refuse to compare unlike things."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.side import DATA, difference_of, prepare_ours
from functa.models.config import FieldConfig, InnerConfig
from functa.models.field.field import Field
from functa.models.field.inner import InnerLoop
from tests.helpers.benchmark_script import answer

needs_jax = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="no jax here: make bench-install")
SIZES = {"spatial": 4, "channels": 4, "width": 16, "depth": 3, "w0": 10.0, "batch": 2, "resolution": 16, "chunk": 512}
KEYS = {
    "name", "config", "precision", "images_per_s", "images_per_cpu_s", "gflop_per_s", "matmul_gflop_per_s", "peer",
    "peer_images_per_s", "peer_images_per_cpu_s", "ratio", "ratios", "peak_rss_mb", "peer_peak_rss_mb",
    "latents_differ", "alternations", "cpus", "cpu", "versions", "passes", "passes_executed",
}  # fmt: skip


@needs_jax
@pytest.mark.parametrize(("name", "precisions"), [("encode", ["float32", "bf16"]), ("meta", ["float32"])])
def test_a_benchmark_prints_a_row_for_every_precision(name: str, precisions: list[str]) -> None:
    sizes = [text for key, value in SIZES.items() for text in (f"--{key}", str(value))]
    turns = ["--alternations", "1", "--seconds", "0.1", "--eager", "--precision", ",".join(precisions)]
    rows = answer(name, *sizes, *turns)
    assert [row["precision"] for row in rows] == precisions
    for row in rows:
        assert row.keys() == KEYS
        assert row["name"] == name and row["config"] == SIZES | {"loss": "image", "compiled": False}
        assert len(row["ratios"]) == row["alternations"] == 1
        assert row["images_per_s"] > 0 and row["peer_images_per_s"] > 0
        assert (row["passes"], row["passes_executed"]) == {"encode": (6, 4), "meta": (21, 15)}[name]
        assert {"torch", "jax"} <= row["versions"].keys()


def leave_latents(folder: Path, error: float) -> dict:
    """Write what the peer leaves for our side, made by our own float32 loop, then spoilt by `error`; return our job."""
    config = SIZES | {"loss": "image", "compiled": False}
    inner = InnerConfig(loss="image", rates="channel")
    field = Field(FieldConfig(**{k: config[k] for k in ("spatial", "channels", "width", "depth", "w0")}), inner, 3)
    images = torch.rand(2, 16, 16, 3, generator=torch.Generator().manual_seed(0))
    z = InnerLoop(field, inner, (16, 16)).encode(images) * (1 + error)
    named = {f"w{i}": w for i, w in enumerate(field.weights)} | {f"b{i}": b for i, b in enumerate(field.biases)}
    named |= {"lam": field.modulation_weight, "lam_b": field.modulation_bias, "lrs": field.rates}
    np.savez(folder / DATA, images=images, z=z, **{k: v.detach().numpy() for k, v in named.items()})
    return {"mode": "encode", "folder": str(folder), "config": config}


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_latents_other_than_the_peers_are_refused(precision: str, tmp_path: Path) -> None:
    """The bound is 1e-4 in float32, whatever precision is timed: bf16 alone would let 2e-2 pass."""
    prepare_ours(leave_latents(tmp_path, error=0) | {"precision": precision})
    with pytest.raises(SystemExit, match="differ from the peer's"):
        prepare_ours(leave_latents(tmp_path, error=1e-3) | {"precision": precision})


def test_latents_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(SystemExit, match="differ from the peer's"):
        difference_of(np.array([np.nan]), np.ones(1), allowed=1.0)
