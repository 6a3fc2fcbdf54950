"""Reconstruction: PSNR of stored latents on test and training images, by inner step, beside linear baselines."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from functa.models.field.inner import InnerLoop
from functa.models.measures.metrics import image_errors, pca_psnr, pooled_psnr, psnr_of_errors
from functa.storage.errors import StorageError
from functa.storage.functaset.functaset import Latents
from functa.storage.functaset.plan import row_id
from functa.tasks.evaluation.evaluator_input import (
    SILENT,
    Bench,
    EvaluationJob,
    Messages,
    Progress,
    open_bench,
    write_arrays,
)
from functa.tasks.evaluation.subset import ENCODED, bounded, changed_rows, stored_subset
from functa.tasks.inputs.pictures import Pictures, as_uint8, spread

PCA_IMAGES = 20_000  # enough to fit 3,072-dimensional covariances; more changes the baseline by hundredths of a dB

PCA_VALUES = 1 << 26  # of all those images together

TRAIN_IMAGES, TRAIN_PIXELS = 1_000, 1 << 22  # of all together

STEP_IMAGES, STEP_PIXELS = 1_000, 1 << 19  # an inner step costs as much as many decodings

MORE_STEPS, MORE_IMAGES = 20, 64  # inner steps beyond those of the training, and the images that they are taken on

DECODED, DECODED_PIXELS = 256, 1 << 20  # images at a time, and their pixels: seconds of a core

EXTREMES = 8


def measure(job: EvaluationJob, messages: Messages = SILENT) -> dict[str, Any]:
    """Measure psnr_test, psnr_train (both pooled too), mae_255, and PSNR by step and of the PCA baselines.

    Training images and those of psnr_by_step are a spread subset, counted in psnr_images, and psnr_by_more_steps is of
    MORE_IMAGES test images. Progress is the number of images whose PSNR is known, for each part of the work.
    """
    bench = open_bench(job)
    latents = bench.functaset.load("test")
    rows = _rows_of(bench, latents.ids)
    errors, clamped, mae = _errors(bench, latents, rows, messages.progress)
    psnr = psnr_of_errors(errors).numpy()
    shown = spread(len(rows), job.evaluation.shown)
    originals, reconstructions = _pictures(bench, latents, rows, shown)
    write_arrays(
        job.output, "reconstruction", originals=originals, reconstructions=reconstructions, psnr=psnr,
        **_extremes(bench, latents, rows, psnr),
    )  # fmt: skip
    trained = _training_errors(bench, messages.progress)
    by_step, counts = _by_step(bench, messages.progress)
    more = _more_steps(bench, messages.progress)
    return {
        "psnr_test": float(psnr.mean()),
        "psnr_test_pooled": pooled_psnr(errors),
        "psnr_test_clamped": psnr_of_errors(clamped).mean().item(),
        **_training_psnr(trained),
        "mae_255": 255 * mae,
        **baselines(bench),
        "psnr_by_step": by_step,
        "psnr_by_more_steps": more,
        "psnr_images": {"test": len(rows), "train": len(trained), "by_step": counts},
    }


def _rows_of(bench: Bench, ids: np.ndarray) -> np.ndarray:
    """Return the rows of the test images of the stored latents, by id: the store has an order of its own."""
    positions = {row_id(key): i for i, key in enumerate(bench.test.keys)}
    missing, changed = sum(bytes(i) not in positions for i in ids), _changed(bench)
    if missing or changed:
        raise StorageError(
            f"{missing} of {len(ids)} test images of {bench.job.functaset} are no longer there or readable, {changed} "
            "changed: restore them, or encode again"
        )
    return np.array([positions[bytes(i)] for i in ids])


def _changed(bench: Bench) -> int:
    """Count test images with other bytes than those that were encoded; only those of another token are read."""
    split, changed = bench.test.split, 0
    today = {key: row for row, key in enumerate(split.keys)}
    for shard in bench.functaset.shards("test"):
        table = shard.table()
        rows = [row for row in shard.rows.tolist() if table.keys[row] in today]
        changed += len(changed_rows(shard, table, rows, split, today))
    return changed


def _errors(bench: Bench, latents: Latents, rows: np.ndarray, progress: Progress) -> tuple[Tensor, Tensor, float]:
    """Return the mean squared error of each test image [n], of it clamped to [0, 1] for showing [n], and the mean
    absolute error of all, clamped."""
    errors, clamped, absolute = [], [], 0.0
    for part in _batches(len(rows), _at_once(bench)):
        pixels = bench.test.batch(rows[part])
        images = bench.decode_raw(torch.from_numpy(latents.dequantized(part)))
        errors.append(image_errors(images, pixels))
        images = images.clamp(0, 1)
        clamped.append(image_errors(images, pixels))
        absolute += (images - pixels).abs().mean((1, 2, 3)).sum().item()
        progress("test images", int(part[-1]) + 1, len(rows))
    return torch.cat(errors), torch.cat(clamped), absolute / len(rows)


def _training_errors(bench: Bench, progress: Progress) -> Tensor:
    """Return the mean squared error of a spread subset of the training images, [n]; n is 0 if all changed."""
    training = stored_subset(bench, "train", bounded(TRAIN_IMAGES, bench, TRAIN_PIXELS))
    parts = []
    for part in _batches(len(training), _at_once(bench)):
        parts.append(image_errors(bench.decode_raw(training.z[part]), training.pixels(part)))
        progress("training images", int(part[-1]) + 1, len(training))
    return torch.cat(parts) if parts else torch.zeros(0)


def _training_psnr(errors: Tensor) -> dict[str, float]:
    if not len(errors):
        return {}
    return {"psnr_train": psnr_of_errors(errors).mean().item(), "psnr_train_pooled": pooled_psnr(errors)}


def _at_once(bench: Bench) -> int:
    return bounded(DECODED, bench, DECODED_PIXELS)


def _batches(count: int, size: int) -> Iterator[np.ndarray]:
    return (np.arange(start, min(start + size, count)) for start in range(0, count, size))


def _pictures(bench: Bench, latents: Latents, rows: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return originals and reconstructions uint8 [n, H, W, ch] of chosen latents."""
    images = bench.decode_raw(torch.from_numpy(latents.dequantized(chosen)))
    return as_uint8(bench.test.batch(rows[chosen])), as_uint8(images)


def _extremes(bench: Bench, latents: Latents, rows: np.ndarray, psnr: np.ndarray) -> dict[str, np.ndarray]:
    """Return the test images of lowest and of highest PSNR with their reconstructions, the extreme ones first."""
    order = np.argsort(psnr, kind="stable")
    count = min(EXTREMES, len(order) // 2)
    arrays: dict[str, np.ndarray] = {}
    for name, chosen in (("worst", order[:count]), ("best", order[::-1][:count])):
        if count:
            originals, reconstructions = _pictures(bench, latents, rows, chosen)
            arrays |= {f"{name}_originals": originals, f"{name}_reconstructions": reconstructions}
            arrays[f"{name}_psnr"] = psnr[chosen]
    return arrays


def _by_step(bench: Bench, progress: Progress) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """Return PSNR after 0, 1, ... inner steps of both splits, before quantisation, and the numbers of images."""
    figures, counts = {}, {}
    for split, pictures in (("test", bench.test), ("train", bench.training)):
        rows = spread(len(pictures), bounded(STEP_IMAGES, bench, STEP_PIXELS))
        report = partial(progress, f"{split} images by inner step")
        figures[split], counts[split] = _steps_of(bench, pictures, rows, report), len(rows)
    return figures, counts


def _more_steps(bench: Bench, progress: Progress) -> dict[str, float]:
    """Return PSNR of a few test images after 0, 1, ... MORE_STEPS inner steps, as far as it is a number."""
    inner = bench.inner.model_copy(update={"steps": max(MORE_STEPS, bench.inner.steps)})
    rows = spread(len(bench.test), bounded(MORE_IMAGES, bench, STEP_PIXELS))
    report = partial(progress, "test images by more inner steps")
    found = _steps_of(bench, bench.test, rows, report, replace(bench.loop, inner=inner))
    return {step: value for step, value in found.items() if math.isfinite(value)}


def _steps_of(
    bench: Bench,
    pictures: Pictures,
    rows: np.ndarray,
    progress: Callable[[int, int], None],
    loop: InnerLoop | None = None,
) -> dict[str, float]:
    loop, errors = (loop or bench.loop).prepared(len(rows)), []
    for part in _batches(len(rows), ENCODED):
        pixels = pictures.batch(rows[part])
        path = loop.by_step(pixels.to(bench.device)).cpu()  # [K + 1, B, s, s, c]
        errors.append(torch.stack([image_errors(bench.decode_raw(z), pixels) for z in path]))
        progress(int(part[-1]) + 1, len(rows))
    psnr = psnr_of_errors(torch.cat(errors, 1)).mean(1)
    return {str(step): value for step, value in enumerate(psnr.tolist())}


def baselines(bench: Bench) -> dict[str, float]:
    """Measure PCA at the field's own latent size: shared over patches, and of whole images.

    Left out where a PCA would have as many numbers as there are values, which is no reduction.
    """
    config = bench.field.config
    height, width = bench.test.resolution
    values = height * width * bench.field.image_channels
    most = min(PCA_IMAGES, max(2, PCA_VALUES // values))
    training = bench.training.batch(spread(len(bench.training), most))
    test = bench.test.batch(spread(len(bench.test), most))
    side = height // config.spatial
    figures = {}
    if config.channels < side * side * bench.field.image_channels:
        figures["psnr_pca_patch"], _ = pca_psnr(training, test, config.channels, side)
    numbers = config.spatial**2 * config.channels
    if numbers < min(len(training), values):
        figures["psnr_pca_image"], _ = pca_psnr(training, test, numbers, None)
    return figures
