"""A GPU computes what a CPU computes: encoding, outer step, training, sampling. Skipped if torch sees no GPU."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from functa.models.config import FieldConfig, InnerConfig
from functa.models.field.field import Field
from functa.models.field.inner import InnerLoop
from functa.tasks.inference.sample import sample_latents
from tests.helpers.storage.functasets import filled
from tests.helpers.tasks.latent_training import run_training, stored_tensors, training_job
from tests.helpers.tasks.sampling import sample_job, save_denoiser

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
SIDE = 32
# (field, precision, compiled): compiling takes most of a minute each
BOUNDS = {"float32": 1e-4, "tf32": 2e-2, "bf16": 0.15, "fp16": 2e-2}  # float32 adds in another order, the others round
FIELDS: list[dict[str, Any]] = [
    {"spatial": 8},
    {"spatial": 1},
    {"spatial": 8, "kernel": 3},
    {"spatial": 8, "interpolation": "bilinear"},
]
LOOPS = [(field, precision, False) for field in FIELDS for precision in BOUNDS]
LOOPS += [(FIELDS[0], precision, True) for precision in BOUNDS] + [(field, "bf16", True) for field in FIELDS[1:]]


def loop(device: str, precision: str = "float32", compiled: bool = False, **variant: Any) -> InnerLoop:
    config = FieldConfig(**{"channels": 16, "width": 64, "depth": 4, "w0": 10} | variant)
    inner = InnerConfig(rates="element", precision=precision)
    return InnerLoop(Field(config, inner, 3, seed=3, resolution=(SIDE, SIDE)).to(device), inner, (SIDE, SIDE), compiled)


def images(device: str) -> torch.Tensor:
    smooth = torch.nn.functional.interpolate(
        torch.rand(6, 3, 6, 6, generator=torch.Generator().manual_seed(1)), size=(SIDE, SIDE), mode="bicubic"
    )
    return smooth.clamp(0, 1).permute(0, 2, 3, 1).contiguous().to(device)


def apart(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference relative to the norm."""
    return float((got.double().cpu() - expected.double().cpu()).norm() / expected.double().cpu().norm())


@pytest.mark.parametrize(("variant", "precision", "compiled"), LOOPS, ids=str)
def test_latents_and_outer_gradients_equal_those_of_a_cpu(
    variant: dict[str, Any], precision: str, compiled: bool
) -> None:
    found = []
    for device, fast in (("cpu", {}), ("cuda", {"precision": precision, "compiled": compiled})):
        its = loop(device, **fast, **variant)
        its.field.zero_grad()
        its.outer_backward(images(device))
        gradients = torch.cat([p.grad.flatten().cpu() for p in its.field.parameters() if p.grad is not None])
        found.append((its.prepared(1 << 20).encode(images(device)), gradients))
    for got, expected in zip(found[1], found[0], strict=True):
        assert torch.isfinite(got).all()
        assert apart(got, expected) < BOUNDS[precision]


@pytest.mark.parametrize("compilation", ["off", "on", "graphs"])
@pytest.mark.parametrize("kind", ["classifier", "diffusion", "vector"])
def test_training_ends_near_the_loss_of_a_cpu(kind: str, compilation: str, tmp_path: Path) -> None:
    """Without dropout and noise, which are drawn on the device."""
    functaset = str(filled(str(tmp_path / "z")).uri)
    quiet = ["noise=0"] if kind == "classifier" else []
    quiet += [] if kind == "vector" else ["model.dropout=0"]
    losses: dict[str, float] = {}
    for device, mode in (("cpu", "off"), ("cuda", compilation)):
        job = training_job(kind, functaset, tmp_path / device, *quiet, f"compile={mode}")
        rows: list[dict[str, Any]] = []
        run_training(job.model_copy(update={"device": device}), rows.append)
        losses[device] = rows[-1]["loss"]
        floats = [tensor for tensor in stored_tensors(tmp_path / device).values() if tensor.dtype.kind == "f"]
        assert all(np.isfinite(tensor).all() for tensor in floats)
    if kind == "classifier":  # a GPU's generator draws other noise for diffusion
        assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)


@pytest.mark.parametrize("kind", ["classifier", "diffusion"])
def test_training_resumes_from_its_checkpoint(kind: str, tmp_path: Path) -> None:
    functaset = str(filled(str(tmp_path / "z")).uri)
    for name, steps in (("whole", (9,)), ("halves", (4, 9))):
        for count in steps:
            job = training_job(kind, functaset, tmp_path / name, f"steps={count}", "decay=constant")
            run_training(job.model_copy(update={"device": "cuda"}))
    whole, halves = stored_tensors(tmp_path / "whole"), stored_tensors(tmp_path / "halves")
    weights = [name for name in whole if name.startswith("model.") and whole[name].dtype.kind == "f"]
    assert weights
    for name in weights:
        assert apart(torch.tensor(halves[name]), torch.tensor(whole[name])) < 1e-3 or abs(whole[name]).max() < 1e-6, (
            name
        )


@pytest.mark.parametrize("compilation", ["off", "on", "graphs"])
def test_samples_equal_those_of_a_cpu(compilation: str, tmp_path: Path) -> None:
    """Noise is drawn from per-index seeds on the CPU."""
    denoiser = save_denoiser(str(tmp_path / "denoiser"), compile=compilation)
    expected = sample_latents(sample_job(denoiser, "", 0, 10, batch=10))
    got = sample_latents(sample_job(denoiser, "", 0, 10, batch=4).model_copy(update={"device": "cuda"}))
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=2e-3)
