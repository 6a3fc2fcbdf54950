"""Preflight reports what will fail before a server is started."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from functa.flows.config.load import load_config
from functa.flows.config.preflight import preflight
from functa.flows.config.schema import ConfigError
from functa.storage.errors import StorageError


@pytest.mark.parametrize(
    ("setting", "stage", "message"),
    [
        (
            "classifier.model.token_channels=3",
            "train_classifier",
            "classifier.model.token_channels: a position's 8 numbers cannot be cut into tokens of 3",
        ),
        (
            "diffusion.model.attention=[3]",
            "train_diffusion",
            "diffusion.model.attention: resolution 3 is no level of this UNet: choose among 2",
        ),
    ],
)
def test_a_model_that_does_not_fit_the_latent_is_one_line(setting: str, stage: str, message: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    config = load_config("digits", [setting])
    for asked in (stage, "pipeline"):
        with pytest.raises(ConfigError, match=message) as caught:
            preflight(config, str(tmp_path), asked)
        assert "\n" not in str(caught.value)
    preflight(config, str(tmp_path), "encode")  # which does not need it


def test_weights_of_inception_are_checked_before_any_work(tmp_path) -> None:  # type: ignore[no-untyped-def]
    missing, other = tmp_path / "none.pth", tmp_path / "other.pth"
    other.write_bytes(b"not the standard file")
    for path, fault in ((missing, "cannot be read"), (other, "is not that of weights-inception")):
        config = load_config("digits", [f"evaluation.fid.weights={path}"])
        for asked in ("pipeline", "evaluate"):
            with pytest.raises(StorageError, match=f"evaluation.fid.weights .*{fault}") as caught:
                preflight(config, str(tmp_path), asked)
            assert "\n" not in str(caught.value) and str(path) in str(caught.value)
        preflight(config, str(tmp_path), "encode")  # which does not need it
        preflight(config.model_copy(update={"diffusion": None}), str(tmp_path), "pipeline")  # there will be no samples


def test_too_few_images_for_fid_are_reported_before_any_work(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "other.pth"
    path.write_bytes(b"any")
    settings = [f"evaluation.fid.weights={path}", "evaluation.fid.any_weights=true"]
    with pytest.raises(StorageError, match="1497 samples and 1497 reference images are too few for FID"):
        preflight(load_config("digits", settings), str(tmp_path), "pipeline")
    preflight(load_config("digits", [*settings, "evaluation.fid.few=true"]), str(tmp_path), "pipeline")


def test_a_classifier_of_one_class_is_refused_before_any_work(tmp_path) -> None:  # type: ignore[no-untyped-def]
    for split in ("train", "test"):
        (tmp_path / "images" / split / "only").mkdir(parents=True)
        for number in range(4):
            Image.new("L", (8, 8), 60 * number).save(tmp_path / "images" / split / "only" / f"{number}.png")
    settings = ["images.source=folder", f"images.location={tmp_path}/images", "images.resolution=8"]
    for asked in ("pipeline", "train_classifier"):
        with pytest.raises(StorageError, match="images: 1 class was found, and a classifier needs two or more: set"):
            preflight(load_config("digits", settings), str(tmp_path / "root"), asked)
    preflight(load_config("digits", [*settings, "classifier=null"]), str(tmp_path / "root"), "pipeline")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["gate.min_top1=0.9", "classifier=null"], r"gate.min_top1: .* top1_test \(classifier=null\)"),
        (["gate.max_ece=0.9", "evaluation.classification=null"], r"measure ece \(evaluation.classification=null\)"),
        (["gate.max_fd=9", "evaluation.quick=true"], r"measure fd.classifier \(evaluation.quick=true\)"),
        (["gate.max_fd=9", "diffusion=null"], r"\(diffusion=null\)"),
        (["gate.max_fd_efficientnet_lite0=9"], r"measure fd.efficientnet_lite0 \(its network takes images of 16x16"),
        (["gate.max_fd_wavelet=9", "evaluation.samples=16"], r"\(16 dimensions need more samples than 16\)"),
        (["gate.max_fd=9", "evaluation.generation.spaces=[latent]"], r"\(evaluation.generation.spaces leaves it out\)"),
        (["gate.min_label_agreement=0.9", "diffusion.process.conditional=false"], "a probe compares labels, and the"),
        (["gate.max_fid=9"], r"measure fid \(it needs evaluation.fid.weights, the standard file\)"),
        (["gate.min_psnr=9", "evaluation.reconstruction=null"], "; set gate.min_psnr=null, or have it measured"),
    ],
)
def test_a_gate_for_a_figure_that_is_not_measured_is_refused_before_any_work(
    settings: list[str], message: str, tmp_path
) -> None:  # type: ignore[no-untyped-def]
    config = load_config("digits", settings)
    with pytest.raises(ConfigError, match=message):
        preflight(config, str(tmp_path), "pipeline")
    preflight(config, str(tmp_path), "encode")  # a stage of its own has no gate
    preflight(load_config("digits", ["gate.min_top1=0.9", "gate.max_fd=9"]), str(tmp_path), "pipeline")


def test_spaces_that_cannot_be_measured_are_reported_before_any_work(tmp_path: Path) -> None:
    asked = load_config("digits", ["evaluation.generation.spaces=[efficientnet_lite0]"])
    with pytest.raises(StorageError, match="efficientnet_lite0 is not possible: its network takes images of 16x16"):
        preflight(asked, str(tmp_path), "pipeline")
    few = load_config("digits", ["evaluation.samples=20"])
    (note,) = preflight(few, str(tmp_path), "evaluate")
    assert note == (
        "20 samples are too few for Frechet distances in the feature spaces classifier (64 dimensions) and latent (32 "
        "dimensions): evaluation.samples above 64 gives them"
    )
    assert not preflight(few, str(tmp_path), "encode")


def test_more_rows_than_a_fragment_holds_are_refused_before_any_work(tmp_path) -> None:  # type: ignore[no-untyped-def]
    images = np.zeros((300_000, 2, 2, 1), np.uint8)
    np.savez(tmp_path / "train.npz", images=images, labels=np.arange(300_000) % 2)
    np.savez(tmp_path / "test.npz", images=images[:4], labels=np.arange(4) % 2)
    settings = ["images.source=npz", f"images.location={tmp_path}", "field.spatial=1", "encode.shard_rows=1"]
    settings += ["encode.chunk_rows=1", "classifier=null", "diffusion=null", "encode.augmentation.count=10000"]
    config = load_config("digits", settings)
    for asked in ("pipeline", "encode"):
        with pytest.raises(StorageError, match=r"3000300000 rows of split 'train', .* encode\.augmentation") as caught:
            preflight(config, str(tmp_path / "root"), asked)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "root").exists()
