"""Images without classes: nothing to classify, and samples are judged by their latents."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from functa.flows.config.load import load_config
from tests.helpers.flows.tiny_config import TINY

pytestmark = pytest.mark.server


@pytest.mark.slow
def test_a_folder_of_one_class_goes_through_the_whole_pipeline(tmp_path: Path, prefect_server: None) -> None:
    from functa.flows.pipeline import pipeline

    pixels = np.random.default_rng(0).integers(0, 255, (60, 8, 8), np.uint8)
    for number, image in enumerate(pixels):
        place = tmp_path / "images" / ("test" if number % 4 == 0 else "train") / "photographs"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{number:02d}.png")
    settings = [
        "images.source=folder", f"images.location={tmp_path}/images", "images.resolution=8", "images.limit=null",
        "classifier=null", "diffusion.process.conditional=false", "evaluation.samples=45",
        "encode.quantization.bits=32",
    ]  # fmt: skip
    metrics = pipeline(str(tmp_path / "root"), config=load_config("digits", [*TINY, *settings]))
    found = json.loads((tmp_path / "root" / "metrics.json").read_text())
    assert found.keys() >= {"psnr_test", "fd", "kd", "memorized_share", "locality"}
    assert set(found["kd"]) == {"latent", "wavelet"}
    assert not {"top1_test", "top1_pixels", "label_agreement"} & found.keys()
    assert "Generation" in (tmp_path / "root" / "report.html").read_text()
    assert metrics["psnr_test"] == found["psnr_test"]


@pytest.mark.slow
def test_one_training_image_ends_with_what_can_be_measured(tmp_path: Path, prefect_server: None) -> None:
    from functa.flows.pipeline import pipeline

    for split, seed in (("train", 0), ("test", 1)):
        pixels = np.random.default_rng(seed).integers(0, 255, (8, 8), np.uint8)
        (tmp_path / "images" / split / "only").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "images" / split / "only" / "one.png")
    settings = [
        "images.source=folder", f"images.location={tmp_path}/images", "images.channels=1", "images.limit=null",
        "classifier=null", "encode.quantization.bits=32",
    ]  # fmt: skip
    metrics = pipeline(str(tmp_path / "root"), config=load_config("digits", [*TINY, *settings]))
    assert metrics["psnr_test"] > 0
    assert "memorized_share" not in metrics
    assert (tmp_path / "root" / "report.html").exists()
