"""Reconstruction: PSNR of both splits and after every inner step, extremes, baselines."""

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

from functa.tasks.evaluation import reconstruction
from functa.tasks.evaluation.evaluator_input import EvaluationJob, Messages, open_bench, read_arrays
from functa.tasks.report.blocks import ReportData, Sheet
from functa.tasks.report.sections import report_sections


def test_psnr_is_measured_on_both_splits_and_after_every_inner_step(evaluated: EvaluationJob) -> None:
    figures, bench = reconstruction.measure(evaluated), open_bench(evaluated)
    assert figures["psnr_images"] == {"test": 200, "train": 200, "by_step": {"test": 200, "train": 200}}
    for split, pictures in (("test", bench.test), ("train", bench.training)):
        images = pictures.batch(np.arange(200))
        steps = figures["psnr_by_step"][split]
        assert steps.keys() == {"0", "1", "2", "3"}
        assert steps["0"] == pytest.approx(_psnr(bench.decode_raw(torch.zeros(200, 2, 2, 8)), images), abs=1e-3)
        assert steps["3"] == pytest.approx(_psnr(bench.decode_raw(bench.loop.encode(images)), images), abs=1e-3)
        assert steps["3"] == pytest.approx(figures[f"psnr_{split}"], abs=0.01)  # nothing was quantised
        assert figures[f"psnr_{split}_pooled"] <= figures[f"psnr_{split}"]
    images = bench.test.batch(np.arange(200))
    clamped = _psnr(bench.decode_raw(bench.loop.encode(images)).clamp(0, 1), images)
    assert figures["psnr_test_clamped"] == pytest.approx(clamped, abs=0.01)
    assert figures["psnr_test_clamped"] > figures["psnr_test"] + 0.05  # digits are black around


def _psnr(found: torch.Tensor, images: torch.Tensor) -> float:
    pairs = zip(images.numpy(), found.numpy(), strict=True)
    return float(np.mean([peak_signal_noise_ratio(image, other, data_range=1) for image, other in pairs]))


def test_the_worst_and_the_best_images_are_shown_with_their_psnr(evaluated: EvaluationJob) -> None:
    reported: list[tuple[str, int, int]] = []
    metrics = reconstruction.measure(evaluated, Messages(lambda *row: reported.append(row)))
    ends = {what: (done, total) for what, done, total in reported}  # the last of each part
    of_steps = {"test images by inner step", "train images by inner step", "test images by more inner steps"}
    assert set(ends) == {"test images", "training images"} | of_steps
    assert all(done == total for done, total in ends.values())
    arrays = read_arrays(evaluated.output, "reconstruction")
    order = np.sort(arrays["psnr"])
    np.testing.assert_array_equal(arrays["worst_psnr"], order[:8])
    np.testing.assert_array_equal(arrays["best_psnr"], order[::-1][:8])
    data = ReportData(title="", metrics=metrics, arrays={"reconstruction": arrays}, psnr_per_image=arrays["psnr"])
    sections = report_sections(data)
    blocks = {block.name: block for section in sections for block in section.blocks if block.name}
    named = {"psnr_histogram", "psnr_by_step", "psnr_by_more_steps"}
    assert blocks.keys() == named | {"reconstructions_worst", "reconstructions_best"}
    worst = blocks["reconstructions_worst"]
    assert isinstance(worst, Sheet)
    assert worst.rows[2].captions[0] == f"{order[0]:.1f}" and len(worst.rows[0].images) == 8


def test_a_baseline_of_as_many_numbers_as_values_is_left_out(evaluated: EvaluationJob) -> None:
    bench = open_bench(evaluated)
    assert reconstruction.baselines(bench).keys() == {"psnr_pca_patch", "psnr_pca_image"}
    config = bench.field.config
    bench.field.config = config.model_copy(update={"channels": 16})  # 16 numbers for 4x4 pixels
    assert reconstruction.baselines(bench) == {}
