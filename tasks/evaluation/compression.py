"""Rate and distortion of the whole path, beside JPEG and WebP; PSNR by bits (Fig. 11).

Rates are measured: of a functaset of the same test images, really written, with all bytes of its latents counted.
"""

import tempfile
from typing import Any

import numpy as np
import torch

from models.metrics import image_errors, psnr_of_errors
from storage.committing import commit
from storage.config import QuantizationConfig
from storage.fragments import plan_fragment, write_shard
from storage.functaset import Functaset
from storage.locations import Location, open_location
from storage.plans import create_functaset, plan_rows
from storage.quantization import Quantizer
from tasks.encoding.ranges import choose_quantizer
from tasks.evaluation.codecs import byte_psnr, rate_curve
from tasks.evaluation.job import Bench, EvaluationJob, Progress, as_uint8, open_bench, silent
from tasks.evaluation.stored import Subset, bounded, float_subset

PIXELS = 1 << 24  # of all images together: 256 of 256x256, all of CIFAR-10's test set
DECODED = 64  # images at a time


def measure(job: EvaluationJob, progress: Progress = silent) -> dict[str, Any]:
    """psnr_by_bits; compression by bits, compression_jpeg and compression_webp by quality; compression_of, the counts.

    A rate is in bits per pixel: bpp of the stored latents, entropy coded; bpp_fixed of exactly so many bits a number;
    bpp_with_field adds the field's share, spread over the set's images; bpp_unamortised the whole field. `progress` is
    told of the numbers of bits that are done.
    """
    bench = open_bench(job)
    test = float_subset(bench, "test", bounded(job.evaluation.compression.images, bench, PIXELS))
    training = float_subset(bench, "train", job.calibration_images)
    by_bits = {"32": _decoded_psnr(bench, test, test.z.numpy())[0]}
    rates = {}
    for bits in job.evaluation.bits:
        config = job.quantization.model_copy(update={"bits": bits})
        quantizer = choose_quantizer(config, bench.loop, training.z, training.pixels)
        assert quantizer is not None
        codes, _ = quantizer.encode(test.z.numpy())
        by_bits[str(bits)], psnr = _decoded_psnr(bench, test, quantizer.decode(codes))
        rates[str(bits)] = _rates(bench, test, quantizer, config) | {"psnr": psnr}
        progress(f"numbers of bits, {len(test)} test images at each", len(rates), len(job.evaluation.bits))
    originals = as_uint8(test.pixels(np.arange(len(test))))
    options = job.evaluation.compression
    return {
        "psnr_by_bits": by_bits,
        "compression": rates,
        "compression_jpeg": rate_curve(originals, "jpeg", options.jpeg),
        "compression_webp": rate_curve(originals, "webp", options.webp),
        "compression_of": {"images": len(test), "field_shared_by": _images(bench), "field_bytes": field_bytes(bench)},
    }


def _decoded_psnr(bench: Bench, test: Subset, z: np.ndarray) -> tuple[float, float]:
    """Mean PSNR of latents [n, s, s, c], as everywhere (nothing clamped), and of the bytes that a viewer would get."""
    errors, levels = [], []
    for rows in np.split(np.arange(len(test)), range(DECODED, len(test), DECODED)):
        pixels = test.pixels(rows)
        images = bench.decode_raw(torch.from_numpy(z[rows]))
        errors.append(image_errors(images, pixels))
        levels.append(byte_psnr(as_uint8(images), as_uint8(pixels)) * len(rows))
    return psnr_of_errors(torch.cat(errors)).mean().item(), sum(levels) / len(test)


def _rates(bench: Bench, test: Subset, quantizer: Quantizer, config: QuantizationConfig) -> dict[str, float]:
    """Bits per pixel of the test latents in four ways of counting."""
    height, width = bench.test.resolution
    numbers = test.z[0].numel()
    with tempfile.TemporaryDirectory() as folder:
        per_number = stored_bits(open_location(folder), bench, test, quantizer, config)
    bpp = per_number * numbers / (height * width)
    shared = 8 * (field_bytes(bench) + quantizer.low.nbytes + quantizer.step.nbytes) / (height * width)
    return {
        "bpp": bpp,
        "bpp_fixed": config.bits * numbers / (height * width),
        "bpp_with_field": bpp + shared / _images(bench),
        "bpp_unamortised": bpp + shared,
    }


def stored_bits(place: Location, bench: Bench, test: Subset, quantizer: Quantizer, config: QuantizationConfig) -> float:
    """Bits per latent number of a functaset of these latents, written to an empty place in the set's own chunks."""
    tensors, described, digest = bench.functaset.field()
    create_functaset(
        place, fingerprint=bench.functaset.fingerprint, field=tensors, field_config=described, field_digest=digest
    )
    plans = [plan for entry, plan in bench.functaset.fragments if entry.split == "test"]
    every = test.pictures.keys
    keys = [every[row] for row in test.rows]
    plan = plan_fragment(
        place, split="test", keys=keys, labels=test.pictures.labels[test.rows], tokens=keys,
        latent_shape=bench.functaset.latent_shape, quantizer=quantizer, codec=config.codec,
        shard_rows=max(plan.shard_rows for plan in plans), chunk_rows=max(plan.chunk_rows for plan in plans),
    )  # fmt: skip
    for shard in range(plan.shards):
        table = plan_rows(place, plan, shard)
        count = len(table.rows)
        write_shard(
            place, plan, shard, latents=test.z[torch.from_numpy(table.rows)].numpy(), labels=table.labels,
            psnr=np.zeros(count, np.float32), sha256=np.zeros((count, 32), np.uint8), good=np.ones(count, bool),
            reasons={}, max_clip_fraction=1.0,
        )  # fmt: skip
    commit(place, [plan.id])
    return float(Functaset.open(place).info()["bits_per_dim"])


def field_bytes(bench: Bench) -> int:
    """float32 bytes of what decoding needs: all of the field but the rates of the inner loop."""
    return sum(4 * weights.numel() for name, weights in bench.field.named_parameters() if name != "rates")


def _images(bench: Bench) -> int:
    return len(bench.training) + len(bench.test)
