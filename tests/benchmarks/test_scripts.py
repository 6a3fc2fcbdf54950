"""The benchmarks that need no peer, on something small."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA

from functa.flows.config.load import load_config
from functa.models.field.grid import patchify
from functa.models.field.inner import InnerLoop
from functa.storage.images.arrays import read_npz
from functa.tasks.config import EncodeConfig
from functa.tasks.encoding.encode import encode_group
from functa.tasks.encoding.finalise import finalise
from functa.tasks.encoding.plan import EncodeJob, plan
from functa.tasks.trained import load_field
from functa.tasks.training import meta_train
from functa.tasks.training_jobs import MetaTrainJob
from tests.helpers.benchmark_script import PROJECT, answer, run


@pytest.mark.slow
def test_gpu_pieces_are_measured_once_and_tabled(tmp_path: Path) -> None:
    out = tmp_path / "gpu.jsonl"
    options = ["--out", out, "--device", "cpu", "--eager", "--presets", "cifar10_8x8x16"]
    matmul = {"piece": "matmul", "precision": "fp16", "tflop_per_s": 1.0, "device": "cpu"}
    out.write_text(json.dumps(matmul) + "\n")  # of an earlier call
    assert "11 pieces left" in run("gpu", *options, "--minutes", "0")
    assert "nothing is left" in run("gpu", *options)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 12 and not any("error" in row for row in rows)  # 4 matmuls; 4 precisions of 2 modes
    table = run("gpu", "--out", out, "--table").splitlines()
    assert sum(line.startswith("| cifar10_8x8x16 |") for line in table) == 8


@pytest.mark.slow
def test_memory_is_reported_of_every_child() -> None:
    row = answer("memory", "--resolution", "32", "--batch", "1", "--images", "1,3", "--encode-batch", "2", "--eager")
    assert row["name"] == "memory" and row["config"]["resolution"] == 32
    assert row["peak"].keys() == {"outer:1", "encode:1", "encode:3"}
    assert all(peak["mib"] > 0 and peak["seconds"] >= 0 for peak in row["peak"].values())


@pytest.mark.slow
def test_a_streamed_training_is_measured_beside_one_in_memory() -> None:
    options = ["--rows", "600", "--shard-rows", "128", "--batch", "8", "--steps", "1", "--turns", "1"]
    figures = answer("streamed", *options)["figures"]
    assert figures.keys() == {"feed", "classifier", "diffusion"}
    assert all(row["memory_images_per_s"] > 0 and row["streamed_images_per_s"] > 0 for row in figures.values())


@pytest.mark.slow
def test_the_store_is_measured_beside_its_peers() -> None:
    options = ["--rows", "600", "--shard-rows", "128", "--memory-rows", "300,600", "--batch", "64"]
    rows = answer("store", *options, "--alternations", "1", "--seconds", "0.01")
    pieces = {row["piece"]: row for row in rows}
    assert len(pieces) == len(rows) == 9
    for piece, peer in {
        "write float32": "write and fsync", "memory, codes": "numpy", "memory, float32": "numpy",
        "mapped, codes, hydrated": "np.memmap", "mapped, float32, in place": "np.memmap",
        "memory, codes dequantised": "numpy, float32", "mapped, codes dequantised": "numpy, float32",
    }.items():  # fmt: skip
        assert pieces[piece]["peer"] == peer and pieces[piece]["ratio"] >= 0 and pieces[piece]["mb_per_s"] > 0
    assert pieces["streamed, float32"]["rows_per_s"] > 0
    assert ("peer" in pieces["streamed, float32"]) == (importlib.util.find_spec("webdataset") is not None)
    assert pieces["memory of streaming"]["peak_mb"].keys() == {"300", "600"}


@pytest.mark.slow
def test_training_steps_are_measured_beside_the_plainest_loop() -> None:
    rows = answer("train", "--presets", "digits", "--seconds", "0.01", "--alternations", "1")
    assert [(row["name"], row["piece"]) for row in rows] == [("train", "classifier"), ("train", "diffusion")]
    for row in rows:
        steps = row["steps_per_s"]
        assert row["config"]["preset"] == "digits" and row["mode"].startswith("compiled")
        assert steps.keys() == row["utilization"].keys() == {"compiled", "eager", "plain"}
        assert row["ratio"] == pytest.approx(steps["compiled"] / steps["plain"], rel=0.02)
        assert row["parameters"] > 0 and all(value > 0 for value in row["utilization"].values())


def test_photographs_become_crops_that_a_run_can_train_on(tmp_path: Path) -> None:
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for number in range(4):  # the first and the third are trained on: one of either orientation
        shape = (512, 768, 3) if number % 3 else (768, 512, 3)
        Image.fromarray(np.full(shape, number, np.uint8)).save(photographs / f"{number}.png")
    assert "90 training and 12 test crops" in run("kodak", photographs, tmp_path / "crops")
    splits = read_npz(str(tmp_path / "crops"))
    assert splits["train"].images.shape == (90, 256, 256, 3)
    assert {split: set(np.unique(source.images)) for split, source in splits.items()} == {
        "train": {0, 2}, "test": {1, 3},
    }  # fmt: skip


def test_photographs_become_random_crops_of_some_and_tiles_of_the_others(tmp_path: Path) -> None:
    for number in range(4):
        Image.fromarray(np.full((256, 384, 3), number, np.uint8)).save(tmp_path / f"{number}.png")
    answered = run("photographs", "crops", tmp_path, tmp_path / "crops")
    assert "2048 training crops of 5 photographs, 12 of 2" in answered
    splits = read_npz(str(tmp_path / "crops"))
    assert splits["train"].images.shape == (2048, 128, 128, 3)
    assert set(np.unique(splits["test"].images)) == {1, 3}


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, Path]:
    """A root with a field of a few steps, and the images that it saw and did not see."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 8)):
        images = generator.integers(0, 256, (count, 8, 8, 1), np.uint8)
        np.savez(tmp_path / f"{split}.npz", images=images, labels=np.zeros(count, np.int64))
    overrides = ["source=npz", f"location={tmp_path}", "resolution=8", "channels=1"]
    steps = ["steps=2", "warmup=0", "batch=4", "validation_images=4", "log_every=1"]
    config = load_config(
        "digits", ["field.width=16", *(f"images.{o}" for o in overrides), *(f"meta_train.{o}" for o in steps)]
    )
    sections = {name: getattr(config, name) for name in ("images", "field", "inner", "meta_train")}
    output = str(tmp_path / "root" / "checkpoints" / "field")
    job = MetaTrainJob(seed=0, device="cpu", output=output, digest="d", **sections)
    meta_train.run(job, emit=lambda _: None)
    return tmp_path / "root", tmp_path


def test_psnr_of_a_trained_field_is_reported_beside_patch_pca(trained: tuple[Path, Path]) -> None:
    row = answer("psnr", *trained)
    assert row["test_images"] == 8
    root, folder = trained
    field, inner, _ = load_field(str(root / "checkpoints" / "field"))
    arrays = read_npz(str(folder))
    train, test = (torch.from_numpy(arrays[split].images).float() / 255 for split in ("train", "test"))
    decoded = field(InnerLoop(field, inner, (8, 8)).encode(test), (8, 8)).detach()
    errors = (decoded - test).square().mean((1, 2, 3))
    assert row["psnr"] == pytest.approx(-10 * errors.log10().mean().item(), abs=0.006)
    assert row["psnr_pooled"] == pytest.approx(-10 * errors.mean().log10().item(), abs=0.006)
    pca = PCA(field.config.channels)  # scikit-learn's, over all patches of 4x4 pixels
    patches = [patchify(images, field.config.spatial).flatten(1).double().numpy() for images in (train, test)]
    pca.fit(patches[0])
    residual = (pca.inverse_transform(pca.transform(patches[1])) - patches[1]) ** 2
    assert row["psnr_pca_patch_pooled"] == pytest.approx(-10 * np.log10(residual.mean()), abs=0.006)
    by_image = residual.reshape(len(test), -1).mean(1)
    assert row["psnr_pca_patch"] == pytest.approx(-10 * np.log10(by_image).mean(), abs=0.006)


def test_bits_and_psnr_of_codes_are_measured(trained: tuple[Path, Path]) -> None:
    root, folder = trained
    images = {"source": "npz", "location": str(folder), "resolution": 8, "channels": 1}
    sections = {"images": images, "encode": EncodeConfig(), "device": "cpu"}
    job = EncodeJob(
        field=str(root / "checkpoints/field"), field_digest="d", functaset=f"{root}/functaset.zarr", **sections
    )
    todo = plan(job)
    for group in todo.groups:
        encode_group(job, group, 32)
    finalise(job, todo)
    options = ["--bits", "8,2", "--ranges", "sigma 6", "--granularities", "channel"]
    row = answer("bits", root, folder, *options)
    assert (row["name"], row["rows"], row["test_images"]) == ("bits", 32, 8)
    assert [(code["range"], code["bits"]) for code in row["codes"]] == [("sigma 6", 8), ("sigma 6", 2)]
    eight, two = row["codes"]
    assert abs(eight["psnr"] - row["psnr"]) < 0.5
    assert two["psnr"] < eight["psnr"]
    for code in row["codes"]:
        assert code["bits_per_dim"].keys() == {"zstd", "exact"}
        assert all(value > 0 for value in code["bits_per_dim"].values())
        assert 0 <= code["clip_fraction"] <= 1


def test_the_bench_lock_adds_packages_and_changes_none() -> None:
    """Else `make bench-install` would change what the benchmarks measure, and what the tests after it test."""
    project, bench = (
        {name.lower() for name in re.findall(r"^([A-Za-z0-9._-]+)==", (PROJECT / lock).read_text(), re.MULTILINE)}
        for lock in ("requirements.lock", "requirements-bench.lock")
    )
    assert "jax" in bench
    assert not bench & project
    assert {"numpy", "scipy", "ml-dtypes"} <= project  # what jax needs besides, installed with --no-deps


@pytest.mark.slow
def test_what_feeds_a_device_is_measured_beside_the_plain_way() -> None:
    row = answer("feed", "--seconds", "0.01")
    rates = row["per_core_s"]
    assert {"JPEG 500x375 -> 256", "32x32 in memory", "copy 256x256", "quantise 32x32x64"} <= rates.keys()
    assert rates["JPEG 2000x1500 -> 256"]["db"] > 38
    assert row["cores"].keys() == {"32x32", "256x256"}
