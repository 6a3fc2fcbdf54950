"""Sampling in slices: sample i does not depend on slices and batches."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from functa.models.compute.compilation import has_compiler
from functa.models.latents.denoiser import Denoiser
from functa.tasks.evaluation.generation.distances import reference_labels
from functa.tasks.inference.sample import read_slices, sample_batches, sample_latents, write_slice
from functa.tasks.trained import load_denoiser
from tests.helpers.tasks.sampling import PROCESS, sample_job, save_denoiser


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_denoiser(str(tmp_path_factory.mktemp("denoiser")))


def test_slices_and_batches_do_not_change_a_sample(denoiser: str) -> None:
    whole = sample_latents(sample_job(denoiser, "", 0, 10, batch=10))
    parts = torch.cat([sample_latents(sample_job(denoiser, "", start, 5, batch=2)) for start in (0, 5)])
    torch.testing.assert_close(whole, parts, atol=1e-4, rtol=1e-4)
    assert whole.std() > 0.1


@pytest.mark.parametrize("mode", ["on", "graphs"])
def test_a_model_compiled_in_training_is_sampled_on_a_machine_without_a_compiler(
    mode: str, denoiser: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = sample_latents(sample_job(denoiser, "", 0, 3))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not has_compiler(torch.device("cpu"))
    compiled = save_denoiser(str(tmp_path), compile=mode)
    torch.testing.assert_close(sample_latents(sample_job(compiled, "", 0, 3)), expected)


def test_a_model_of_an_earlier_version_whose_time_embedding_is_wider_is_sampled(denoiser: str, tmp_path: Path) -> None:
    wider = save_denoiser(str(tmp_path), time_numbers=64)
    assert load_denoiser(wider)[0].unet.time_embedding.linear_1.weight.shape == (128, 64)
    assert load_denoiser(denoiser)[0].unet.time_embedding.linear_1.weight.shape == (128, 32)
    assert sample_latents(sample_job(wider, "", 0, 3)).isfinite().all()


def test_tf32_is_switched_on_for_the_denoiser_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[str] = []
    real = Denoiser.forward

    def forward(self: Denoiser, *inputs: Any) -> torch.Tensor:
        inside.append(torch.get_float32_matmul_precision())
        return real(self, *inputs)

    monkeypatch.setattr(Denoiser, "forward", forward)
    batches = sample_batches(sample_job(save_denoiser(str(tmp_path), precision="tf32"), "", 0, 6))
    outside = [torch.get_float32_matmul_precision() for _ in batches]  # where samples are decoded
    assert (set(inside), set(outside)) == ({"high"}, {"highest"})


def test_an_existing_slice_is_kept(denoiser: str, tmp_path: Path) -> None:
    uris = [write_slice(sample_job(denoiser, str(tmp_path), start, 3)) for start in (0, 3)]
    stamps = [p.stat().st_mtime_ns for p in sorted(tmp_path.iterdir())]
    assert [write_slice(sample_job(denoiser, str(tmp_path), start, 3)) for start in (0, 3)] == uris
    assert [p.stat().st_mtime_ns for p in sorted(tmp_path.iterdir())] == stamps
    assert read_slices(uris).shape == (6, 2, 2, 4)


def test_progress_counts_denoising_steps_over_all_batches(denoiser: str) -> None:
    reported: list[tuple[int, int]] = []
    sample_latents(sample_job(denoiser, "", 0, 10, batch=4), lambda done, total: reported.append((done, total)))
    assert {total for _, total in reported} == {3 * PROCESS.sampling_steps}  # 3 batches, the last one of 2 samples
    assert [done for done, _ in reported] == list(range(1, 3 * PROCESS.sampling_steps + 1))


def test_labels_follow_the_training_sets_proportions() -> None:
    labels = np.repeat([2, 0, 1], [10, 30, 60])
    drawn = np.bincount(reference_labels(labels, 1000), minlength=3)
    np.testing.assert_allclose(drawn / 1000, [0.3, 0.6, 0.1], atol=0.01)
