"""Measures: PSNR and its linear baselines, Frechet distance, accuracy and calibration."""

import torch
from torch import Tensor

ROWS = 4096  # rows per float64 product: bounds memory, changes no result that matters


def image_errors(images: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of each image, [B, H, W, ch] in [0, 1] each -> [B]."""
    return (images - targets).square().mean((1, 2, 3))  # [B]


def psnr_of_errors(errors: Tensor) -> Tensor:
    """PSNR in dB of mean squared errors in [0, 1] units, element by element; infinite for 0."""
    return -10 * errors.log10()


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """PSNR in dB of each image, [B, H, W, ch] in [0, 1] each -> [B]; nothing is clamped. Its mean is "PSNR"."""
    return psnr_of_errors(image_errors(images, targets))


def pooled_psnr(errors: Tensor) -> float:
    """PSNR in dB of the mean of all images' errors [B]: never above the mean of their PSNRs."""
    return psnr_of_errors(errors.double().mean()).item()


class FrechetStatistics:
    """Streaming moments of features [n, D]: n, sum x and sum x x^T in float64, which merge by addition.

    Of features [n, P, D], as many moments as there are groups P: no covariance between groups is kept.
    """

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | None = None  # [D] or [P, D]
        self.outer: Tensor | None = None  # [D, D] or [P, D, D]

    def update(self, features: Tensor) -> "FrechetStatistics":
        """Adds features [B, D] or [B, P, D], of any float type and device."""
        for part in torch.split(features.detach(), ROWS):
            x = part.double().movedim(0, -2)  # [B, D] or [P, B, D]
            self._add(len(part), x.sum(-2), x.mT @ x)
        return self

    @classmethod
    def of_sums(cls, count: int, total: Tensor, triangle: Tensor) -> "FrechetStatistics":
        """From n, sum x [D] and the upper triangle of sum x x^T [D (D + 1) / 2], as `triangle` gives them."""
        side = total.shape[-1]
        upper = torch.zeros(*total.shape, side, dtype=torch.float64)
        rows, columns = torch.triu_indices(side, side)
        upper[..., rows, columns] = triangle.double()
        statistics = cls()
        statistics._add(count, total.double(), upper + upper.triu(1).mT)
        return statistics

    @property
    def triangle(self) -> Tensor:
        """Upper triangle of sum x x^T, row by row: [D (D + 1) / 2], or by group, float64, on the CPU."""
        if self.outer is None:
            return torch.empty(0, dtype=torch.float64)
        rows, columns = torch.triu_indices(*self.outer.shape[-2:])
        return self.outer.cpu()[..., rows, columns]

    def merge(self, other: "FrechetStatistics") -> "FrechetStatistics":
        """Adds what another has seen."""
        if other.total is not None and other.outer is not None:
            self._add(other.count, other.total, other.outer)
        return self

    def _add(self, count: int, total: Tensor, outer: Tensor) -> None:
        if self.total is not None and self.total.shape != total.shape:
            ours, theirs = ("x".join(map(str, sums.shape)) for sums in (self.total, total))
            raise ValueError(f"statistics of {ours} features cannot take features of {theirs}")
        self.count += count
        self.total = total if self.total is None else self.total + total
        self.outer = outer if self.outer is None else self.outer + outer

    @property
    def dimensions(self) -> int:
        """D, 0 before the first row."""
        return 0 if self.total is None else self.total.shape[-1]

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean [D] and unbiased covariance [D, D] (or by group), float64, on the CPU. ValueError below two rows."""
        if self.count < 2 or self.total is None or self.outer is None:
            raise ValueError(f"a covariance needs at least 2 rows of features, not {self.count}")
        mean = self.total.cpu() / self.count
        return mean, (self.outer.cpu() - self.count * mean[..., None] * mean[..., None, :]) / (self.count - 1)


def frechet_distance(a: FrechetStatistics, b: FrechetStatistics) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2), float64 (Heusel et al. 2017). "FID" on Inception features only.

    torchmetrics offers this from images alone, not from statistics. tr (S_a S_b)^1/2 is taken from the symmetric
    S_a^1/2 S_b S_a^1/2, which has the same eigenvalues: no complex root, and rank-deficient covariances are safe.
    Of features in groups it is the mean of the groups' distances.
    """
    (mean_a, cov_a), (mean_b, cov_b) = a.moments(), b.moments()
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()[..., None, :]) @ vectors.mT  # S_a^1/2 [D, D]
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum(-1)
    traces = [covariance.diagonal(dim1=-2, dim2=-1).sum(-1) for covariance in (cov_a, cov_b)]
    return float(((mean_a - mean_b).square().sum(-1) + sum(traces) - 2 * cross).mean())


def pca_psnr(train: Tensor, test: Tensor, numbers: int, patch: int | tuple[int, int] | None) -> tuple[float, float]:
    """The linear baseline: what `numbers` principal components keep of the test images, in dB.

    train [N, H, W, ch], test [M, H, W, ch] in [0, 1]. patch p (or height and width): one basis for all p x p patches,
    `numbers` per patch; None: one basis for whole images. Returns (mean of the images' PSNR, PSNR of the mean error).
    """
    mean, basis = _principal(train, numbers, patch)
    errors = []
    for part in torch.split(test, ROWS):
        centred = _rows(part, patch).double().cpu() - mean  # [B patches, D]
        residual = centred - centred @ basis @ basis.T
        errors.append(residual.square().reshape(len(part), -1).mean(1))  # [B]
    mse = torch.cat(errors)
    return psnr_of_errors(mse).mean().item(), pooled_psnr(mse)


def _principal(train: Tensor, numbers: int, patch: int | tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """Mean [D] and the first `numbers` principal axes [D, numbers], the last the strongest.

    Fewer axes where the rows span fewer dimensions: all there is of them is kept then.
    """
    example = _rows(train[:1], patch)  # [patches of an image, D]
    if len(train) * len(example) < example.shape[1]:  # fewer rows than values: by their products [N, N]
        centred = _rows(train, patch).double().cpu()
        mean = centred.mean(0)
        centred = centred - mean
        strength, vectors = torch.linalg.eigh(centred @ centred.T)
        least = strength[-1] * len(centred) * torch.finfo(strength.dtype).eps
        kept = (strength > least).nonzero().flatten()[-numbers:]  # repeated rows leave products without a length
        return mean, centred.T @ (vectors[:, kept] / strength[kept].sqrt())
    statistics = FrechetStatistics()
    for part in torch.split(train, ROWS):
        statistics.update(_rows(part, patch))
    mean, covariance = statistics.moments()
    return mean, torch.linalg.eigh(covariance)[1][:, -numbers:]  # eigenvalues ascend


def _rows(images: Tensor, patch: int | tuple[int, int] | None) -> Tensor:
    """Images [B, H, W, ch] -> [B patches, D], the patches of an image in a row; whole images where patch is None."""
    if patch is None:
        return images.flatten(1)
    height, width = (patch, patch) if isinstance(patch, int) else patch
    if images.shape[1] % height or images.shape[2] % width:
        raise ValueError(f"{images.shape[1]}x{images.shape[2]} images are not divisible into {height}x{width} patches")
    patches = images.unfold(1, height, height).unfold(2, width, width)  # [B, rows, columns, ch, height, width]
    return patches.flatten(3).flatten(0, 2)


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy over all examples: probabilities or logits [B, K], labels int64 [B]."""
    from torchmetrics.functional.classification import multiclass_accuracy

    return float(multiclass_accuracy(predictions, labels, num_classes=predictions.shape[1], average="micro"))


def top_accuracy(predictions: Tensor, labels: Tensor, first: int) -> float:
    """Share of examples whose label is among the `first` largest of their logits [B, K], labels int64 [B]."""
    from torchmetrics.functional.classification import multiclass_accuracy

    classes = predictions.shape[1]
    return float(multiclass_accuracy(predictions, labels, num_classes=classes, average="micro", top_k=first))


def confusion_matrix(predictions: Tensor, labels: Tensor) -> Tensor:
    """int64 [K, K]: examples by class (rows) and by the class that they were taken for (columns)."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    return multiclass_confusion_matrix(predictions, labels, num_classes=predictions.shape[1])


def reliability(probabilities: Tensor, labels: Tensor, bins: int = 15) -> tuple[Tensor, Tensor, Tensor]:
    """Return the calibration error's terms: examples, mean confidence, accuracy of each of equal bins of confidence.

    probabilities [B, K], labels int64 [B] -> int64 [bins], float64 [bins] twice, NaN where a bin is empty.
    """
    confidence, guess = probabilities.double().max(1)
    # A confidence at a border belongs above it, as in torchmetrics; 1 to the last bin.
    borders = torch.linspace(0, 1, bins + 1, dtype=probabilities.dtype).double()
    bin_of = (torch.bucketize(confidence, borders, right=True) - 1).clamp(0, bins - 1)
    count = torch.bincount(bin_of, minlength=bins)
    correct = torch.bincount(bin_of, weights=(guess == labels).double(), minlength=bins)
    return count, torch.bincount(bin_of, weights=confidence, minlength=bins) / count, correct / count


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error, L1 over equal bins of confidence: probabilities [B, K], labels int64 [B]."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    classes = probabilities.shape[1]
    return float(multiclass_calibration_error(probabilities, labels, num_classes=classes, n_bins=bins, norm="l1"))
