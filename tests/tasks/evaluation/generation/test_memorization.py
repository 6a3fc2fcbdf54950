"""Memorisation of real latents of digits: copies are found, named and counted; a model that overfits is flagged."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from functa.flows.config.load import load_config
from functa.models.config import DiffusionConfig
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.plan import row_id
from functa.storage.images.source import open_images
from functa.storage.places.address import open_location
from functa.tasks.encoding.encode import encode_group
from functa.tasks.encoding.finalise import finalise
from functa.tasks.encoding.plan import EncodeJob, plan
from functa.tasks.evaluation.evaluator_input import EvaluationJob, Messages, read_arrays
from functa.tasks.evaluation.generation import memorization
from functa.tasks.inference.sample import SampleJob, write_slice
from functa.tasks.inputs.latents import PlainRows
from functa.tasks.report.blocks import ReportData, Sheet, Table
from functa.tasks.report.sections.memorization import section
from functa.tasks.training.diffusion import run as train_diffusion
from functa.tasks.training.meta_train import run as train_field
from functa.tasks.training_jobs import DiffusionJob, MetaTrainJob
from tests.helpers.flows.tiny_config import TINY
from tests.helpers.storage.image_files import noise
from tests.helpers.tasks.evaluated import with_samples

FLOAT = "encode.quantization.bits=32"


def field_of(folder: Path, *overrides: str) -> str:
    """Train a field on digits."""
    config = load_config("digits", [*overrides])
    job = MetaTrainJob(
        seed=0, images=config.images, field=config.field, inner=config.inner, meta_train=config.meta_train,
        device="cpu", output=str(folder), digest="d",
    )  # fmt: skip
    train_field(job, lambda row: None)
    return str(folder)


def work(field: str, folder: Path, *overrides: str) -> EvaluationJob:
    """Encode digits with the field; return the job of the evaluators."""
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
    """Return a job on 200 digits, with a folder for its results."""
    return encoded.model_copy(update={"output": str(tmp_path / "run")})


def slice_of(folder: Path, z: np.ndarray) -> str:
    """Write latents as a file of samples."""
    buffer = io.BytesIO()
    np.save(buffer, z)
    open_location(str(folder)).write("latents.npy", buffer.getvalue())
    return f"{folder}/latents.npy"


def test_copies_of_training_images_are_named_counted_and_flagged(tiny: EvaluationJob, tmp_path: Path) -> None:
    train = Functaset.open(tiny.functaset).load("train")
    rows = np.concatenate([np.flatnonzero(train.labels == 3)[[0, 0, 0, 1]], np.flatnonzero(train.labels == 5)[:6]])
    noise = np.random.default_rng(0).normal(0, 1e-4, (10, 2, 2, 8)).astype(np.float32)
    labels = train.labels[rows].tolist()
    figures = memorization.measure(with_samples(tiny, [slice_of(tmp_path, train.dequantized(rows) + noise)], labels))
    assert figures["distinct"] == {"3": 2, "5": 6, "all": 8}
    assert figures["memorized"] and figures["memorized_share"] == 1
    arrays = read_arrays(tiny.output, "memorization")
    assert arrays["nearest"].shape == (3, 8, 8, 8, 1)
    images = open_images(tiny.images).split("train")
    positions = {row_id(key): position for position, key in enumerate(images.keys)}
    shown = rows[np.linspace(0, 9, 8).round().astype(int)]
    originals = images.read([positions[bytes(train.ids[row])] for row in shown]).images
    np.testing.assert_array_equal(arrays["nearest"][0], originals)
    assert (np.diff(arrays["distances"], axis=0) >= 0).all()
    np.testing.assert_array_equal(arrays["neighbour_labels"][0], train.labels[shown])


def test_images_that_no_model_has_seen_are_not_flagged(tiny: EvaluationJob, tmp_path: Path) -> None:
    """Latents of test images are as good as samples can be."""
    z = Functaset.open(tiny.functaset).load("test").dequantized()
    figures = memorization.measure(with_samples(tiny, [slice_of(tmp_path, z)], None))
    assert figures["memorized_share"] <= 0.05 and figures["memorized_share_images"] <= 0.05
    assert not figures["memorized"]
    assert len(figures["distinct"]) == 11  # classes by the nearest image's label
    assert figures["distinct_expected"]["all"] == pytest.approx(200 * (1 - (1 - 1 / 200) ** 200))


def test_the_section_shows_the_copies_and_their_share(tiny: EvaluationJob, tmp_path: Path) -> None:
    train = Functaset.open(tiny.functaset).load("train")
    figures = memorization.measure(with_samples(tiny, [slice_of(tmp_path, train.dequantized(np.arange(40)))], None))
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
    """Samples are decoded on request and shortlisted by thumbnails, which differ between digits too."""
    z = Functaset.open(tiny.functaset).load("train").dequantized(np.arange(0, 200, 7))
    samples = slice_of(tmp_path, z)
    figures = memorization.measure(with_samples(tiny, [samples], None))
    monkeypatch.setattr(memorization, "KEPT_BYTES", 0)
    monkeypatch.setattr(memorization, "BATCH", 64)
    monkeypatch.setattr(memorization, "SIDE", 4)
    assert memorization.measure(with_samples(tiny, [samples], None)) == figures


def test_classes_without_training_images_count_nowhere(tiny: EvaluationJob, tmp_path: Path) -> None:
    """They have no expected count, and would only add to the counted images."""
    train = Functaset.open(tiny.functaset).load("train")
    threes, rest = np.flatnonzero(train.labels == 3)[[0, 0, 0, 1]], np.flatnonzero(train.labels == 5)[:5]
    samples = slice_of(tmp_path, train.dequantized(np.concatenate([threes, rest])))
    figures = memorization.measure(with_samples(tiny, [samples], [3] * 4 + [12] * 5))
    assert figures["distinct"] == {"3": 2, "all": 2}
    assert figures["distinct_expected"]["all"] == figures["distinct_expected"]["3"]
    table = read_arrays(tiny.output, "memorization")
    assert table["table_draws"].tolist() == [4, 4]
    assert table["table_images"].tolist() == [(train.labels == 3).sum()] * 2


def test_only_the_latents_of_neighbours_are_read(
    encoded: EvaluationJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A split may be larger than memory, above all with augmentations, which are never neighbours."""
    settings = ("evaluation.memorization.null_images=6",)
    augmented = work(encoded.field, tmp_path / "a", *TINY, "encode.augmentation.count=2", *settings)
    evaluation = augmented.evaluation
    plain = encoded.model_copy(update={"output": str(tmp_path / "run"), "evaluation": evaluation})
    assert Functaset.open(augmented.functaset).rows("train") == 3 * Functaset.open(plain.functaset).rows("train") == 600
    train = Functaset.open(plain.functaset).load("train")
    wanted = np.arange(0, 200, 25)
    samples = slice_of(tmp_path, train.dequantized(wanted))
    read: list[int] = []
    real = PlainRows.read
    monkeypatch.setattr(Functaset, "load", lambda *_: pytest.fail("a whole split was read"))
    monkeypatch.setattr(PlainRows, "read", lambda self, rows: read.append(len(rows)) or real(self, rows))
    figures = [memorization.measure(with_samples(job, [samples], None)) for job in (plain, augmented)]
    assert figures[0] == figures[1]
    assert sum(read) <= 2 * (6 + 3 * (8 + 6))
    arrays = [read_arrays(job.output, "memorization") for job in (plain, augmented)]
    for name in ("neighbour_labels", "nearest", "table_images"):
        np.testing.assert_array_equal(arrays[0][name], arrays[1][name])
    np.testing.assert_allclose(arrays[0]["isolation"], arrays[1]["isolation"], atol=1e-4)
    assert arrays[1]["isolation"].max() < 1e-4  # each sample beside its own latent's reconstruction


def put(folder: Path, name: str, seed: int) -> None:
    """Write a picture of noise."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(seed, channels=1)).save(path)


@pytest.fixture
def of_files(encoded: EvaluationJob, tmp_path: Path) -> EvaluationJob:
    """Encode files of noise: 40 training images, and 20 test images of which two are training images too."""
    for i in range(40):
        put(tmp_path / "x", f"train/{'ab'[i % 2]}/{i:03d}.png", i)
    for i in range(20):
        put(tmp_path / "x", f"test/{'ab'[i % 2]}/{i:03d}.png", i if i < 2 else 100 + i)
    images = ("images.source=folder", "images.channels=1", f"images.location={tmp_path / 'x'}")
    return work(encoded.field, tmp_path, *TINY, *images)


def test_changed_images_are_not_compared_with_their_old_latents(of_files: EvaluationJob, tmp_path: Path) -> None:
    train = Functaset.open(of_files.functaset).load("train")
    row = train.keys.index("train/a/010.png")
    samples = slice_of(tmp_path, train.dequantized(np.array([row, row - 1])))

    def measured() -> tuple[int, list[float]]:
        """Measure how many training images there are, and how isolated the two samples lie."""
        memorization.measure(with_samples(of_files, [samples], None))
        arrays = read_arrays(of_files.output, "memorization")
        return int(arrays["table_images"][-1]), arrays["isolation"].tolist()

    count, isolated = measured()
    assert count == 40 and max(isolated) < 0.01
    path = tmp_path / "x/train/a/010.png"
    before = path.read_bytes()
    os.utime(path, ns=(5, 5))
    assert measured() == (40, isolated)  # another time, the same bytes
    put(tmp_path / "x", "train/a/010.png", 77)
    count, isolated = measured()
    assert count == 39 and isolated[0] > 0.1 and isolated[1] < 0.01
    path.write_bytes(before)
    assert measured()[0] == 40
    for other in (tmp_path / "x/train").rglob("*.png"):
        put(tmp_path / "x", str(other.relative_to(tmp_path / "x")), 500 + int(other.stem))
    warnings: list[str] = []
    assert memorization.measure(with_samples(of_files, [samples], None), Messages(warn=warnings.append)) == {}
    assert "no memorisation: 0 of the training images" in warnings[0]
    assert warnings[0].endswith("nearest ones need 2; restore the images, or encode again")


def test_where_test_images_repeat_training_images_the_report_gives_no_verdict(
    of_files: EvaluationJob, tmp_path: Path
) -> None:
    """Samples that are copies are not reported then: there is no figure instead of a wrong one."""
    train = Functaset.open(of_files.functaset).load("train")
    figures = memorization.measure(with_samples(of_files, [slice_of(tmp_path, train.dequantized(np.arange(30)))], None))
    assert not figures.keys() & {"memorized", "memorized_share"}
    assert figures["distinct"]["all"] <= 30
    arrays = {"memorization": read_arrays(of_files.output, "memorization")}
    shown = section(ReportData(title="t", metrics=figures, arrays=arrays, classes=["a", "b"]))
    assert shown is not None
    assert shown.about.startswith("No verdict on whether the model repeats its training images is possible: 10.0 % of")


def diffused(job: EvaluationJob, folder: Path, *overrides: str) -> dict[str, Any]:
    """Measure 500 samples of a model trained on the job's functaset."""
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
    return memorization.measure(with_samples(job, [write_slice(sampled)], labels))


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
