"""Flat folders from images to report: without labels, and with a table of them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from functa.flows.config.load import load_config
from functa.flows.config.preflight import preflight
from functa.storage.errors import StorageError
from functa.storage.places.local import LocalLocation
from tests.helpers.flows.tiny_config import TINY

pytestmark = [pytest.mark.server, pytest.mark.slow]

UNLABELLED = ["classifier=null", "diffusion.process.conditional=false"]


def flat(folder: Path, count: int = 90) -> list[str]:
    """Write grey pictures into one folder, and beside it a table of their three labels; return the settings."""
    (folder / "photos").mkdir()
    random, lines = np.random.default_rng(0), []
    for number in range(count):
        pixels = random.integers(0, 80, (8, 8), np.uint8)
        pixels[2 * (number % 3) :][:2] += 160  # the label can be seen
        Image.fromarray(pixels).save(folder / "photos" / f"{number:03d}.png")
        lines.append(f"{number:03d}.png,{['ant', 'bee', 'cow'][number % 3]}\n")
    (folder / "labels.csv").write_text("file,label\n" + "".join(lines))
    return [
        *TINY, "images.source=folder", f"images.location={folder}/photos", "images.resolution=8", "images.limit=null",
        "images.test_fraction=0.3", "evaluation.samples=27", "encode.quantization.bits=32",
    ]  # fmt: skip


def test_a_flat_folder_without_labels_runs_but_for_the_classifier(tmp_path: Path, prefect_server: None) -> None:
    from functa.flows.pipeline import pipeline

    settings = flat(tmp_path)
    for asked, fix in (
        (settings, r"a classifier needs: set classifier=null and diffusion\.process\.conditional=false"),
        ([*settings, "classifier=null"], r"a conditional diffusion model needs: set diffusion\.process\.conditional=f"),
    ):
        with pytest.raises(StorageError, match=f"{tmp_path}/photos: the images have no labels, which {fix}"):
            preflight(load_config("digits", asked), str(tmp_path / "root"), "pipeline")
    metrics = pipeline(str(tmp_path / "root"), config=load_config("digits", [*settings, *UNLABELLED]))
    assert metrics["rows"] == 90
    assert {"psnr_test", "fd", "memorized_share"} <= metrics.keys()
    assert not {"top1_test", "label_agreement"} & metrics.keys()
    assert (tmp_path / "root/report.html").is_file()


def test_a_flat_folder_with_a_table_of_labels_runs_with_its_classifier(
    tmp_path: Path, prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the process of the pipeline, with the threads that encode and compute features, lists the images once."""
    from functa.flows.pipeline import pipeline

    settings = [*flat(tmp_path), f"images.labels={tmp_path}/labels.csv", "evaluation.features_slice=10"]
    listed, listing = list[str](), LocalLocation.listing
    monkeypatch.setattr(
        LocalLocation, "listing", lambda self, prefix="": listed.append(self.uri) or listing(self, prefix)
    )
    metrics = pipeline(str(tmp_path / "root"), config=load_config("digits", settings))
    assert listed == [f"{tmp_path}/photos"]
    assert metrics["rows"] == 90
    assert 0 <= metrics["top1_test"] <= 1 and "label_agreement" in metrics
    classes = json.loads((tmp_path / "root/stages/encode.json").read_text())["pipeline"]["images"]
    assert classes["labels"] == f"{tmp_path}/labels.csv"
    assert "cow" in (tmp_path / "root/report.html").read_text()
