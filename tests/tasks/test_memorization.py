"""Memorisation of real latents of digits: copies are found, named and counted; a model that overfits is flagged."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flows.config import load_config
from models.config import DiffusionConfig
from storage.functaset import Functaset
from storage.images import open_images
from storage.locations import open_location
from storage.plans import row_id
from tasks.encoding.finalise import finalise
from tasks.encoding.group import encode_group
from tasks.encoding.plan import EncodeJob, plan
from tasks.evaluation import memorization
from tasks.evaluation.job import EvaluationJob, read_arrays
from tasks.report.blocks import Sheet, Table
from tasks.report.data import ReportData
from tasks.report.sections.memorization import section
from tasks.sample import SampleJob, write_slice
from tasks.training.diffusion import DiffusionJob
from tasks.training.diffusion import run as train_diffusion
from tasks.training.meta_train import MetaTrainJob
from tasks.training.meta_train import run as train_field
from tests.flows.tiny import TINY

FLOAT = "encode.quantization.bits=32"


def field_of(folder: Path, *overrides: str) -> str:
    """A trained field."""
    config = load_config("digits", [*overrides])
    job = MetaTrainJob(
        seed=0, images=config.images, field=config.field, inner=config.inner, meta_train=config.meta_train,
        device="cpu", output=str(folder), digest="d",
    )  # fmt: skip
    train_field(job, lambda row: None)
    return str(folder)


def work(field: str, folder: Path, *overrides: str) -> EvaluationJob:
    """Digits encoded by it, and what evaluators are given."""
    config = load_config("digits", [FLOAT, *overrides])
    encoding = EncodeJob(
        images=config.images, encode=config.encode, field=field, field_digest="feed", functaset=str(folder / "z"),
        device="cpu",
    )  # fmt: skip
    planned = plan(encoding)
    for group in planned.groups:
        encode_group(encoding, group, 2000)
    finalise(encoding, planned)
    return EvaluationJob(
        seed=0, images=config.images, quantization=config.encode.quantization, evaluation=config.evaluation,
        calibration_images=64, functaset=encoding.functaset, field=field, output=str(folder / "run"), device="cpu",
    )  # fmt: skip


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> EvaluationJob:
    folder = tmp_path_factory.mktemp("encoded")
    return work(field_of(folder / "field", *TINY), folder, *TINY)


@pytest.fixture
def tiny(encoded: EvaluationJob, tmp_path: Path) -> EvaluationJob:
    """200 digits, and a folder for what is measured."""
    return encoded.model_copy(update={"output": str(tmp_path / "run")})


def slice_of(folder: Path, z: np.ndarray) -> str:
    """Latents as a file of samples."""
    buffer = io.BytesIO()
    np.save(buffer, z)
    open_location(str(folder)).write("latents.npy", buffer.getvalue())
    return f"{folder}/latents.npy"


def test_copies_of_training_images_are_named_counted_and_flagged(tiny: EvaluationJob, tmp_path: Path) -> None:
    train = Functaset.open(tiny.functaset).load("train")
    rows = np.concatenate([np.flatnonzero(train.labels == 3)[[0, 0, 0, 1]], np.flatnonzero(train.labels == 5)[:6]])
    noise = np.random.default_rng(0).normal(0, 1e-4, (10, 2, 2, 8)).astype(np.float32)
    labels = train.labels[rows].tolist()
    figures = memorization.measure(tiny, [slice_of(tmp_path, train.dequantized(rows) + noise)], labels)
    assert figures["distinct"] == {"3": 2, "5": 6, "all": 8}
    assert figures["memorized"] and figures["memorized_share"] == 1
    arrays = read_arrays(tiny.output, "memorization")
    assert arrays["nearest"].shape == (3, 8, 8, 8, 1)
    images = open_images(tiny.images).split("train")
    places = {row_id(key): place for place, key in enumerate(images.keys)}
    shown = rows[np.linspace(0, 9, 8).round().astype(int)]
    originals = images.read([places[bytes(train.ids[row])] for row in shown]).images
    np.testing.assert_array_equal(arrays["nearest"][0], originals)
    assert (np.diff(arrays["distances"], axis=0) >= 0).all()
    np.testing.assert_array_equal(arrays["neighbour_labels"][0], train.labels[shown])


def test_what_no_model_has_seen_is_not_flagged(tiny: EvaluationJob, tmp_path: Path) -> None:
    """Latents of test images are as good as samples can be."""
    z = Functaset.open(tiny.functaset).load("test").dequantized()
    figures = memorization.measure(tiny, [slice_of(tmp_path, z)], None)
    assert figures["memorized_share"] <= 0.05 and figures["memorized_share_images"] <= 0.05
    assert not figures["memorized"]
    assert len(figures["distinct"]) == 11  # classes by the nearest image's label
    assert figures["distinct_expected"]["all"] == pytest.approx(200 * (1 - (1 - 1 / 200) ** 200))


def test_the_section_says_which_and_how_many(tiny: EvaluationJob, tmp_path: Path) -> None:
    train = Functaset.open(tiny.functaset).load("train")
    figures = memorization.measure(tiny, [slice_of(tmp_path, train.dequantized(np.arange(40)))], None)
    arrays = {"memorization": read_arrays(tiny.output, "memorization")}
    names = [f"digit {n}" for n in range(10)]
    shown = section(ReportData(title="t", metrics=figures, arrays=arrays, classes=names))
    assert shown is not None
    assert shown.about.startswith("The model repeats its training images: 100.0 % of the samples")
    (sheet,) = [block for block in shown.blocks if isinstance(block, Sheet)]
    assert [row.label.split()[0] for row in sheet.rows] == ["sample", "nearest", "second", "third"]
    assert sheet.rows[0].captions[0] == f"digit {train.labels[0]}, repeats"
    (table,) = [block for block in shown.blocks if isinstance(block, Table)]
    assert table.rows[-1][:4] == ("all", 200, 40, 40)
    assert section(ReportData(title="t", metrics=figures)) is None  # an older run


def test_samples_that_do_not_fit_in_memory_and_large_images_give_the_same(
    tiny: EvaluationJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoded when asked for; shortlisted by thumbnails, which tell digits apart too."""
    z = Functaset.open(tiny.functaset).load("train").dequantized(np.arange(0, 200, 7))
    samples = slice_of(tmp_path, z)
    figures = memorization.measure(tiny, [samples], None)
    monkeypatch.setattr(memorization, "KEPT_BYTES", 0)
    monkeypatch.setattr(memorization, "BATCH", 64)
    monkeypatch.setattr(memorization, "SIDE", 4)
    assert memorization.measure(tiny, [samples], None) == figures


def diffused(job: EvaluationJob, folder: Path, *overrides: str) -> dict[str, Any]:
    """What is measured of 500 samples of a model trained on the job's functaset."""
    config = load_config("digits", [f"diffusion.{each}" for each in overrides])
    assert config.diffusion is not None
    denoiser = str(folder / "denoiser")
    train_diffusion(
        DiffusionJob(seed=0, device="cpu", digest="d", classes=10, diffusion=config.diffusion,
                     functaset=job.functaset, output=denoiser),
        lambda row: None,
    )  # fmt: skip
    labels = [i // 50 for i in range(500)]
    process = DiffusionConfig.model_validate(config.diffusion.process.model_dump() | {"sampling_steps": 50})
    sampled = SampleJob(
        denoiser=denoiser, process=process, seed=0, start=0, labels=tuple(labels), count=500, batch=250, device="cpu",
        output=str(folder / "samples"),
    )  # fmt: skip
    return memorization.measure(job, [write_slice(sampled)], labels)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a minute and a half of one core
def test_a_model_overfitted_on_64_images_is_flagged_and_one_trained_normally_is_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    field = field_of(tmp_path / "field", "meta_train.steps=200")
    few, all_ = work(field, tmp_path / "few", "images.limit=64"), work(field, tmp_path / "all")
    overfitted = diffused(few, tmp_path / "few", "steps=1000", "batch=64")
    assert overfitted["memorized"] and overfitted["memorized_share"] > 0.5
    assert overfitted["distinct"]["all"] <= 64
    normal = diffused(all_, tmp_path / "all")  # as the demo trains it
    assert not normal["memorized"] and normal["memorized_share"] < 0.05
