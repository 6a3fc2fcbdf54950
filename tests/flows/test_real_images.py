"""The presets that people start with, in full, on real images: minutes each, so apart (`make test-slow`)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.server, pytest.mark.timeout(2400)]


def run(root: Path, *arguments: str) -> dict:  # type: ignore[type-arg]
    code = "from functa.flows.cli.main import main; main()"
    command = [sys.executable, "-c", code, "run", *arguments, "--root", str(root)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=2300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((root / "metrics.json").read_text())


def test_the_demo_reaches_its_documented_quality(tmp_path: Path) -> None:
    """32 numbers an image; linear baselines at that size are 18.8 dB (patch PCA) and 26.4 dB (whole-image PCA)."""
    metrics = run(tmp_path / "root", "digits")
    assert metrics["psnr_test"] >= 29
    assert metrics["top1_test"] >= 0.95
    assert metrics["bits_per_dim"] <= 8
    sample, floor, ceiling = (metrics[key]["classifier"] for key in ("fd", "fd_reconstruction", "fd_noise"))
    assert (sample - floor) / (ceiling - floor) <= 0.25
    assert metrics["label_agreement"]["classifier"] >= 0.9
    assert metrics["psnr_pca_patch"] == pytest.approx(18.8, abs=0.4)
    assert metrics["psnr_pca_image"] == pytest.approx(26.4, abs=0.4)


def test_latents_of_any_seed_separate_the_digits(tmp_path: Path) -> None:
    """Logistic regression on the pixels reaches 0.98."""
    quick = ["--set", "diffusion=null"]
    top1 = [run(tmp_path / str(seed), "digits", "--set", f"seed={seed}", *quick)["top1_test"] for seed in range(3)]
    assert sum(top1) / 3 >= 0.96


@pytest.mark.shared
def test_real_photographs_come_out_better_than_patch_pca(shared: Path, tmp_path: Path) -> None:
    images = tmp_path / "cifar10"
    subprocess.run([sys.executable, shared / "data" / "unpack.py", "cifar10_subset", images], check=True)
    metrics = run(tmp_path / "root", "cifar10_quick", "--set", f"images.location={images}")
    assert metrics["rows"] == 12_000
    assert metrics["psnr_test"] > metrics["psnr_pca_patch"]
    assert metrics["psnr_pca_patch"] == pytest.approx(34.8, abs=0.2)
    assert metrics["psnr_pca_image"] == pytest.approx(37.1, abs=0.2)
