"""Reconstruction: PSNR of stored latents, beside linear baselines of the same size; PSNR by bits (Fig. 11)."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.metrics import pca_psnr, pooled_psnr, psnr_of_errors
from storage.commits import committed_receipt, live_shards, visible_rows
from storage.errors import StorageError
from storage.fragments import read_array
from storage.plans import plan_rows, row_id
from tasks.encoding.ranges import choose_quantizer
from tasks.evaluation.job import Bench, EvaluationJob, as_uint8, open_bench, write_arrays
from tasks.training.pictures import spread

PCA_IMAGES = 20_000  # enough to fit 3,072-dimensional covariances; more changes the baseline by hundredths of a dB
BITS_IMAGES = 1_000


def measure(job: EvaluationJob) -> dict[str, Any]:
    """psnr_test, psnr_test_pooled, mae_255, psnr_pca_patch, psnr_pca_image, psnr_by_bits."""
    bench = open_bench(job)
    latents = bench.functaset.load("test")
    pixels = _pixels_of(bench, latents.ids)
    reconstructions = _decode_raw(bench, torch.from_numpy(latents.dequantized()))
    errors = (reconstructions - pixels).square().mean((1, 2, 3))
    shown = spread(len(pixels), job.evaluation.shown)
    write_arrays(
        job.output,
        "reconstruction",
        originals=as_uint8(pixels[shown]),
        reconstructions=as_uint8(reconstructions[shown]),
        psnr=psnr_of_errors(errors).numpy(),
    )
    return {
        "psnr_test": psnr_of_errors(errors).mean().item(),
        "psnr_test_pooled": pooled_psnr(errors),
        "mae_255": 255 * (reconstructions.clamp(0, 1) - pixels).abs().mean().item(),
        **_baselines(bench),
        "psnr_by_bits": _by_bits(bench),
    }


def _pixels_of(bench: Bench, ids: np.ndarray) -> Tensor:
    """The test images of the stored rows, by id: the store's order is its own."""
    places = {row_id(key): i for i, key in enumerate(bench.test.keys)}
    gone, changed = sum(bytes(i) not in places for i in ids), _changed(bench)
    if gone or changed:
        raise StorageError(
            f"{gone} of {len(ids)} test images of {bench.job.functaset} are no longer there or readable, {changed} "
            "changed: restore them, or encode again"
        )
    return bench.test.batch(np.array([places[bytes(i)] for i in ids]))


def _changed(bench: Bench) -> int:
    """How many test images have other bytes than those that were encoded. Read again is what has another token."""
    split, place, changed = bench.test.split, bench.functaset.location, 0
    today = {key: row for row, key in enumerate(split.keys)}
    for entry, plan in bench.functaset.fragments:
        for shard in live_shards(entry, plan) if entry.split == "test" else ():
            receipt, table = committed_receipt(place, entry, plan, shard), plan_rows(place, plan, shard)
            rows = [int(row) for row in np.flatnonzero(visible_rows(entry, plan, receipt)) if table.keys[row] in today]
            other = [row for row in rows if table.tokens[row] != split.tokens[today[table.keys[row]]]]
            if other:
                encoded = read_array(place, plan, receipt, "source_sha256")[other]
                found = split.read([today[table.keys[row]] for row in other]).sha256
                changed += int((encoded != found).any(1).sum())
    return changed


def _decode_raw(bench: Bench, z: Tensor) -> Tensor:
    """Unclamped, as PSNR wants it (functa's definition)."""
    with torch.no_grad():
        parts = [bench.field(part.to(bench.device), bench.test.resolution).cpu() for part in z.split(256)]
    return torch.cat(parts)


def _baselines(bench: Bench) -> dict[str, float]:
    """PCA at the field's own latent size: shared over patches, and of whole images (design section 4)."""
    config = bench.field.config
    training = bench.training.batch(spread(len(bench.training), PCA_IMAGES))
    test = bench.test.batch(np.arange(len(bench.test)))
    side = bench.test.resolution[0] // config.spatial
    figures = {}
    if config.channels <= side * side * bench.field.image_channels:
        figures["psnr_pca_patch"], _ = pca_psnr(training, test, config.channels, side)
    numbers = config.spatial**2 * config.channels
    if numbers <= min(len(training) - 1, training[0].numel()):
        figures["psnr_pca_image"], _ = pca_psnr(training, test, numbers, None)
    return figures


def _by_bits(bench: Bench) -> dict[str, float]:
    """Test PSNR from float32 latents and from their codes, ranges calibrated as for the functaset."""
    job = bench.job
    training = bench.training.batch(spread(len(bench.training), job.calibration_images))
    calibration = _encoded(bench, training)
    pixels = bench.test.batch(spread(len(bench.test), BITS_IMAGES))
    z = _encoded(bench, pixels)
    figures = {"32": _psnr(bench, z, pixels)}
    for bits in job.evaluation.bits:
        config = job.quantization.model_copy(update={"bits": bits})
        quantizer = choose_quantizer(config, bench.loop, calibration, lambda rows: training[rows])
        assert quantizer is not None
        codes, _ = quantizer.encode(z.numpy())
        figures[str(bits)] = _psnr(bench, torch.from_numpy(quantizer.decode(codes)), pixels)
    return figures


def _encoded(bench: Bench, pixels: Tensor) -> Tensor:
    return torch.cat([bench.loop.encode(part.to(bench.device)).cpu() for part in pixels.split(64)])


def _psnr(bench: Bench, z: Tensor, pixels: Tensor) -> float:
    return psnr_of_errors((_decode_raw(bench, z) - pixels).square().mean((1, 2, 3))).mean().item()
