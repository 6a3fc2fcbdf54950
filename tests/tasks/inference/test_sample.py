"""Sampling in slices: sample i is the same however the work was cut."""

from pathlib import Path

import numpy as np
import pytest
import torch

from functa.models.compute.compilation import has_compiler
from functa.models.config import DenoiserConfig, DiffusionConfig
from functa.models.latents.denoiser import build_denoiser
from functa.storage.places.address import open_location
from functa.storage.runs.checkpoints import save_checkpoint
from functa.tasks.evaluation.generation.distances import reference_labels
from functa.tasks.inference.sample import SampleJob, read_slices, sample_latents, write_slice

PROCESS = DiffusionConfig(timesteps=20, sampling_steps=5, clip=3.0)


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_denoiser(str(tmp_path_factory.mktemp("denoiser")))


def save_denoiser(folder: str, **trained: str) -> str:
    """As a training with these settings leaves it."""
    torch.manual_seed(0)
    config = DenoiserConfig(channels=32, multipliers=(1,), groups=4, head_channels=32)
    model = build_denoiser(config, (2, 2, 4), 3)
    for parameter in model.parameters():  # a fresh denoiser predicts zero: give it something to say
        parameter.data += 0.02 * torch.randn_like(parameter)
    metadata = {
        "model": config.model_dump(mode="json"), "latent_shape": [2, 2, 4], "classes": 3, "process": {},
        "finished": True, "config": trained,
        "normalizer": {"mean": [[[0.5] * 4]], "scale": [[[2.0] * 4]]},
    }  # fmt: skip
    weights = {f"model.{k}": v.numpy() for k, v in model.state_dict().items()}
    save_checkpoint(open_location(folder), 1, weights, metadata)
    return folder


def job(denoiser: str, output: str, start: int, count: int, batch: int = 4) -> SampleJob:
    labels = tuple((start + i) % 3 for i in range(count))
    return SampleJob(
        denoiser=denoiser, process=PROCESS, seed=5, start=start, labels=labels, count=count, batch=batch,
        device="cpu", output=output,
    )  # fmt: skip


def test_slices_and_batches_do_not_change_a_sample(denoiser: str) -> None:
    whole = sample_latents(job(denoiser, "", 0, 10, batch=10))
    parts = torch.cat([sample_latents(job(denoiser, "", start, 5, batch=2)) for start in (0, 5)])
    torch.testing.assert_close(whole, parts, atol=1e-4, rtol=1e-4)
    assert whole.std() > 0.1


@pytest.mark.parametrize("mode", ["on", "graphs"])
def test_what_compiled_where_it_was_trained_is_sampled_where_nothing_compiles(
    mode: str, denoiser: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = sample_latents(job(denoiser, "", 0, 3))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not has_compiler(torch.device("cpu"))
    compiled = save_denoiser(str(tmp_path), compile=mode)
    torch.testing.assert_close(sample_latents(job(compiled, "", 0, 3)), expected)


def test_a_slice_that_stands_is_kept(denoiser: str, tmp_path: Path) -> None:
    uris = [write_slice(job(denoiser, str(tmp_path), start, 3)) for start in (0, 3)]
    stamps = [p.stat().st_mtime_ns for p in sorted(tmp_path.iterdir())]
    assert [write_slice(job(denoiser, str(tmp_path), start, 3)) for start in (0, 3)] == uris
    assert [p.stat().st_mtime_ns for p in sorted(tmp_path.iterdir())] == stamps
    assert read_slices(uris).shape == (6, 2, 2, 4)


def test_labels_follow_the_training_sets_proportions() -> None:
    labels = np.repeat([2, 0, 1], [10, 30, 60])
    drawn = np.bincount(reference_labels(labels, 1000), minlength=3)
    np.testing.assert_allclose(drawn / 1000, [0.3, 0.6, 0.1], atol=0.01)
