"""Metrics against closed forms, scipy, torchmetrics, and known figures of the digits."""

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchmetrics.image.fid import FrechetInceptionDistance, _compute_fid

from functa.models.measures.metrics import (
    FrechetStatistics,
    accuracy,
    confusion_matrix,
    expected_calibration_error,
    frechet_distance,
    image_errors,
    pca_psnr,
    pooled_psnr,
    psnr,
    reliability,
    top_accuracy,
)


def test_psnr_is_per_image_and_pooled_psnr_of_the_mean_error() -> None:
    targets = torch.rand(4, 5, 6, 3)
    images = targets + torch.tensor([0.1, 0.01, 0.5, 0.2]).reshape(4, 1, 1, 1) * torch.randn(4, 5, 6, 3)
    each = peak_signal_noise_ratio(images, targets, data_range=1.0, dim=(1, 2, 3), reduction="none")
    torch.testing.assert_close(psnr(images, targets), each)
    assert images.max() > 1  # beyond the range, and not clamped
    pooled = peak_signal_noise_ratio(images, targets, data_range=1.0).item()
    assert pooled_psnr(image_errors(images, targets)) == pytest.approx(pooled, rel=1e-5)
    assert pooled < each.mean()


def features(rows: int, dimensions: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimensions, dimensions, generator=generator, dtype=torch.float64)
    x = torch.randn(rows, dimensions, generator=generator, dtype=torch.float64)
    return x @ mixing / dimensions**0.5 + 0.3 * seed


@pytest.mark.parametrize(
    "rows", [(500, 400), (20, 500), (20, 24)], ids=["full rank", "one deficient", "both deficient"]
)
def test_frechet_distance_agrees_with_scipy_and_torchmetrics(rows: tuple[int, int]) -> None:
    sets = [features(n, 48, seed) for seed, n in enumerate(rows, start=1)]
    ours = frechet_distance(*(FrechetStatistics().update(x) for x in sets))
    (mean_a, cov_a), (mean_b, cov_b) = [(x.mean(0), torch.cov(x.T)) for x in sets]
    root = np.trace(scipy.linalg.sqrtm((cov_a @ cov_b).numpy())).real
    by_scipy = ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root).item()
    assert ours == pytest.approx(by_scipy, rel=1e-6)
    assert ours == pytest.approx(_compute_fid(mean_a, cov_a, mean_b, cov_b).item(), rel=1e-6)


def test_of_features_in_groups_the_distance_is_the_mean_of_the_groups() -> None:
    sets = [torch.stack([features(n, 12, seed), features(n, 12, seed + 9)], 1) for seed, n in enumerate((80, 90))]
    known = [FrechetStatistics().update(x) for x in sets]
    apart = [frechet_distance(*(FrechetStatistics().update(x[:, group]) for x in sets)) for group in (0, 1)]
    assert frechet_distance(*known) == pytest.approx(sum(apart) / 2, rel=1e-9)
    back = FrechetStatistics.of_sums(known[0].count, known[0].total, known[0].triangle)  # type: ignore[arg-type]
    assert frechet_distance(back, known[1]) == pytest.approx(sum(apart) / 2, rel=1e-9)
    assert known[0].dimensions == 12 and known[0].triangle.shape == (2, 12 * 13 // 2)


def test_frechet_distance_of_a_set_to_itself_is_zero_and_of_a_shift_its_square() -> None:
    x = features(300, 16, 1)
    own = FrechetStatistics().update(x)
    assert frechet_distance(own, own) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(own, FrechetStatistics().update(x + 2)) == pytest.approx(16 * 4, rel=1e-6)


def test_streamed_and_merged_statistics_equal_those_of_the_whole() -> None:
    x = features(5000, 12, 2) + 10
    parts = FrechetStatistics()
    for part in x.split(1234):
        parts.merge(FrechetStatistics().update(part.float()))
    mean, covariance = parts.merge(FrechetStatistics()).moments()
    assert parts.count == 5000
    torch.testing.assert_close(mean, x.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(covariance, torch.cov(x.T), rtol=1e-5, atol=1e-6)


def test_statistics_come_back_from_their_sums_bit_for_bit() -> None:
    known = FrechetStatistics().update(features(50, 7, 1))
    assert known.total is not None and known.outer is not None
    back = FrechetStatistics.of_sums(known.count, known.total, known.triangle)
    assert known.triangle.shape == (7 * 8 // 2,)
    assert back.outer is not None and torch.equal(back.outer.triu(), known.outer.triu())
    torch.testing.assert_close(back.outer, known.outer, rtol=1e-15, atol=0)
    trace = float(known.moments()[1].trace())  # what the distance of equal sets is rounded against
    assert frechet_distance(back, known) == pytest.approx(0, abs=1e-12 * trace)


@pytest.mark.parametrize("rows", [(300, 200), (2, 200), (5, 7)], ids=["full rank", "two rows", "both deficient"])
def test_frechet_distance_of_a_feature_module_is_torchmetrics_own(rows: tuple[int, int]) -> None:
    """With torchmetrics' own states in float64, rank-deficient covariances included."""
    metric = FrechetInceptionDistance(feature=torch.nn.Flatten(), input_img_size=(1, 4, 8)).set_dtype(torch.float64)
    sets = [features(n, 32, seed) for seed, n in enumerate(rows, start=1)]
    for x, real in zip(sets, (True, False), strict=True):
        metric.update(x.reshape(-1, 1, 4, 8), real=real)
    ours = frechet_distance(*(FrechetStatistics().update(x) for x in sets))
    assert ours == pytest.approx(metric.compute().item(), rel=1e-6)


def test_statistics_refuse_other_features_and_too_few_rows() -> None:
    with pytest.raises(ValueError, match="12 features"):
        FrechetStatistics().update(features(4, 12, 1)).update(features(4, 13, 1))
    for few in (FrechetStatistics(), FrechetStatistics().update(features(1, 3, 1))):
        with pytest.raises(ValueError, match="at least 2 rows"):
            few.moments()


@pytest.mark.parametrize(("numbers", "patch", "known"), [(8, 4, 18.8), (32, None, 26.4)])
def test_linear_baselines_of_the_digits_at_32_numbers(numbers: int, patch: int | None, known: float) -> None:
    digits = load_digits()
    images = torch.from_numpy(digits.images / 16).float()[..., None]
    train, test = train_test_split(images, test_size=300, stratify=digits.target, random_state=0)
    mean, pooled = pca_psnr(train, test, numbers, patch)
    assert mean == pytest.approx(known, abs=0.4)
    assert pooled <= mean


def test_pca_is_exact_with_every_number_and_takes_oblong_patches() -> None:
    images = torch.rand(60, 4, 6, 2)
    assert pca_psnr(images, images[:9], 12, (2, 3))[0] > 200
    assert pca_psnr(images, images[:9], 6, (2, 3))[0] < 30
    with pytest.raises(ValueError, match="4x6 images are not divisible into 4x4"):
        pca_psnr(images, images, 2, 4)


@pytest.mark.parametrize("images", [20, 60])  # fewer than the 48 values of an image, and more
def test_pca_of_whole_images_is_scikit_learns(images: int) -> None:
    train, test = np.random.default_rng(0).random((2, images, 4, 6, 2))
    peer = PCA(7).fit(train.reshape(images, -1))
    errors = test.reshape(images, -1) - peer.inverse_transform(peer.transform(test.reshape(images, -1)))
    expected = -10 * np.log10((errors**2).mean(1))
    found = pca_psnr(torch.from_numpy(train), torch.from_numpy(test), 7, None)
    assert found == pytest.approx((expected.mean(), -10 * np.log10((errors**2).mean())))


@pytest.mark.parametrize(("images", "patch"), [(20, None), (3, 2)])
def test_pca_of_images_that_repeat_keeps_what_they_span(images: int, patch: int | None) -> None:
    """Rows less their mean span one dimension less than there are different ones."""
    once = torch.rand(images, 8, 8, 3)
    twice = torch.cat([once, once])
    spanned = len(once) * (1 if patch is None else 16) - 1
    span = min(spanned, 12) if patch else spanned
    found = pca_psnr(twice, torch.rand(5, 8, 8, 3), span, patch)
    if patch is None:
        assert pca_psnr(twice, once, span + 10, patch)[0] > 200  # all there is is kept
        assert pca_psnr(once, once, span - 5, patch) == pytest.approx(pca_psnr(twice, once, span - 5, patch))
    assert all(np.isfinite(found))


def test_one_patch_per_image_is_the_whole_image_by_the_cheaper_way(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = torch.rand(2, 15, 8, 8, 3)
    expected = pca_psnr(train, test, 9, None)
    monkeypatch.setattr("functa.models.measures.metrics.FrechetStatistics", None)  # no covariance of 192 values
    assert pca_psnr(train, test, 9, 8) == pytest.approx(expected)
    assert np.isfinite(pca_psnr(train[:2], test, 9, (4, 8))).all()  # 4 patches of 96 values


def test_accuracy_and_calibration_error_equal_their_definitions() -> None:
    probabilities = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.8, 0.2], [0.8, 0.2], [0.3, 0.7]])
    labels = torch.tensor([0, 0, 1, 1, 1])
    assert accuracy(probabilities, labels) == pytest.approx(3 / 5)
    expected = 4 / 5 * abs(2 / 4 - 0.8) + 1 / 5 * abs(1 - 0.7)
    assert expected_calibration_error(probabilities, labels) == pytest.approx(expected, rel=1e-5)


def test_top_accuracies_and_confusion_equal_their_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(500, 8, generator=generator), torch.randint(0, 7, (500,), generator=generator)
    order = logits.argsort(1, descending=True)
    assert top_accuracy(logits, labels, 5) == pytest.approx((order[:, :5] == labels[:, None]).any(1).double().mean())
    assert top_accuracy(logits, labels, 1) == pytest.approx(accuracy(logits, labels))
    counts = confusion_matrix(logits, labels)
    assert counts.sum() == 500 and counts[7].sum() == 0  # no image of the last class
    for row, column in ((0, 0), (3, 5)):
        assert counts[row, column] == ((labels == row) & (order[:, 0] == column)).sum()
    by_class = multiclass_accuracy(logits, labels, num_classes=8, average="none")
    torch.testing.assert_close((counts.diag() / counts.sum(1))[:7], by_class[:7])


def test_the_reliability_diagram_sums_up_to_the_calibration_error() -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.softmax(3 * torch.randn(900, 6, generator=generator), 1)
    labels = torch.randint(0, 6, (900,), generator=generator)
    count, confidence, correct = reliability(probabilities, labels)
    assert count.sum() == 900 and (count[:2] == 0).all() and confidence[:2].isnan().all()  # the largest of 6 is > 1/6
    full = count > 0
    gap = (count[full] / 900 * (confidence[full] - correct[full]).abs()).sum().item()
    assert gap == pytest.approx(expected_calibration_error(probabilities, labels), abs=1e-6)
    certain = reliability(torch.eye(3), torch.tensor([0, 1, 0]))
    assert certain[0].tolist() == [0] * 14 + [3] and certain[2][-1] == pytest.approx(2 / 3)
