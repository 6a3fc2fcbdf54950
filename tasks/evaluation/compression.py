"""Rate and distortion of the whole path, beside JPEG and WebP; PSNR by bits (Fig. 11).

Rates are measured: of a functaset of the same test images, really written, with all bytes of its latents counted.
"""

import io
import tempfile
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from functa.models.measures.metrics import image_errors, psnr_of_errors
from functa.storage.config import QuantizationConfig
from functa.storage.functaset.commit import commit
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.header import create_functaset
from functa.storage.functaset.plan import RowTable
from functa.storage.functaset.planning import plan_fragment
from functa.storage.functaset.quantizer import Quantizer
from functa.storage.functaset.shards.writing import write_shard
from functa.storage.places.local import LocalLocation
from functa.storage.places.location import Location
from functa.tasks.encoding.quantizer_choice import choose_quantizer
from functa.tasks.evaluation.evaluator_input import SILENT, Bench, EvaluationJob, Messages, open_bench
from functa.tasks.evaluation.subset import Subset, bounded, float_subset
from functa.tasks.inputs.pictures import as_uint8, to_picture

PIXELS = 1 << 24  # of all images together: 256 of 256x256, all of CIFAR-10's test set

DECODED = 64  # images at a time


def measure(job: EvaluationJob, messages: Messages = SILENT) -> dict[str, Any]:
    """Measure psnr_by_bits, compression by bits, compression_jpeg and compression_webp by quality, compression_of.

    A rate is in bits per pixel: bpp of the stored latents, entropy coded; bpp_fixed of exactly so many bits a number;
    bpp_with_field adds the field's share, spread over the set's images; bpp_unamortised the whole field. Progress
    is the number of bit widths done.
    """
    options = job.evaluation.compression
    assert options is not None  # else the evaluator is left out
    bench = open_bench(job)
    test = float_subset(bench, "test", bounded(options.images, bench, PIXELS))
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
        messages.progress(f"numbers of bits, {len(test)} test images at each", len(rates), len(job.evaluation.bits))
    originals = as_uint8(test.pixels(np.arange(len(test))))
    return {
        "psnr_by_bits": by_bits,
        "compression": rates,
        "compression_jpeg": rate_curve(originals, "jpeg", options.jpeg),
        "compression_webp": rate_curve(originals, "webp", options.webp),
        "compression_of": {"images": len(test), "field_shared_by": _images(bench), "field_bytes": field_bytes(bench)},
    }


def _decoded_psnr(bench: Bench, test: Subset, z: np.ndarray) -> tuple[float, float]:
    """Return mean PSNR of latents [n, s, s, c], as everywhere (unclamped), and of the bytes that a viewer would get."""
    errors, levels = [], []
    for rows in np.split(np.arange(len(test)), range(DECODED, len(test), DECODED)):
        pixels = test.pixels(rows)
        images = bench.decode_raw(torch.from_numpy(z[rows]))
        errors.append(image_errors(images, pixels))
        levels.append(byte_psnr(as_uint8(images), as_uint8(pixels)) * len(rows))
    return psnr_of_errors(torch.cat(errors)).mean().item(), sum(levels) / len(test)


def _rates(bench: Bench, test: Subset, quantizer: Quantizer, config: QuantizationConfig) -> dict[str, float]:
    """Return the bits per pixel of the test latents in four ways of counting."""
    height, width = bench.test.resolution
    numbers = test.z[0].numel()
    with tempfile.TemporaryDirectory() as folder:
        per_number = stored_bits(LocalLocation(folder), bench, test, quantizer, config)
    bpp = per_number * numbers / (height * width)
    shared = 8 * (field_bytes(bench) + quantizer.low.nbytes + quantizer.step.nbytes) / (height * width)
    return {
        "bpp": bpp,
        "bpp_fixed": config.bits * numbers / (height * width),
        "bpp_with_field": bpp + shared / _images(bench),
        "bpp_unamortised": bpp + shared,
    }


def stored_bits(
    location: Location, bench: Bench, test: Subset, quantizer: Quantizer, config: QuantizationConfig
) -> float:
    """Write these latents to an empty location in the set's own chunks; return the bits per latent number."""
    tensors, described, digest = bench.functaset.field()
    create_functaset(
        location, fingerprint=bench.functaset.fingerprint, field=tensors, field_config=described, field_digest=digest
    )
    plans = [fragment.plan for fragment in bench.functaset.fragments if fragment.split == "test"]
    every = test.pictures.keys
    keys = [every[row] for row in test.rows]
    fragment = plan_fragment(
        location, RowTable.of(keys, test.pictures.labels[test.rows], keys), split="test",
        latent_shape=bench.functaset.latent_shape, quantizer=quantizer, codec=config.codec,
        shard_rows=max(plan.shard_rows for plan in plans), chunk_rows=max(plan.chunk_rows for plan in plans),
    )  # fmt: skip
    for shard in fragment.shards:
        latents = test.z[torch.from_numpy(shard.table().rows)].numpy()
        psnr, sha256 = np.zeros(shard.size, np.float32), np.zeros((shard.size, 32), np.uint8)
        write_shard(shard, latents=latents, psnr=psnr, sha256=sha256, max_clip_fraction=1.0)
    commit(location, [fragment.id])
    return float(Functaset.open(location).info()["bits_per_dim"])


def field_bytes(bench: Bench) -> int:
    """Return the float32 bytes that decoding needs: all of the field but the rates of the inner loop."""
    return sum(4 * weights.numel() for name, weights in bench.field.named_parameters() if name != "rates")


def _images(bench: Bench) -> int:
    return len(bench.training) + len(bench.test)


Codec = Literal["jpeg", "webp"]


def rate_curve(images: np.ndarray, codec: Codec, qualities: Sequence[int]) -> dict[str, dict[str, float]]:
    """Return {bpp, psnr} by quality of images uint8 [n, H, W, 1 or 3]: bits per pixel of whole files, PSNR in dB.

    For JPEG also bpp_scan: the coded pixels alone, without the file's headers and tables, as if a set shared them.
    """
    return {str(quality): _point(images, codec, quality) for quality in sorted(set(qualities))}


def _point(images: np.ndarray, codec: Codec, quality: int) -> dict[str, float]:
    pixels = images[..., 0].size
    files = [encode(image, codec, quality) for image in images]
    decoded = np.stack([decode(data, images.shape[-1]) for data in files])
    figures = {"bpp": 8 * sum(map(len, files)) / pixels, "psnr": byte_psnr(decoded, images)}
    if codec == "jpeg":
        # Tables fitted to one image are no tables for a set: the standard ones, which code the same coefficients.
        plain = [_jpeg(image, quality, optimize=False) for image in images]
        figures["bpp_scan"] = 8 * sum(map(scan_bytes, plain)) / pixels
    return figures


def encode(image: np.ndarray, codec: Codec, quality: int) -> bytes:
    """Encode an image uint8 [H, W, 1 or 3] as a file: JPEG with fitted Huffman tables, or lossy WebP."""
    if codec == "jpeg":
        return _jpeg(image, quality, optimize=True)
    buffer = io.BytesIO()
    to_picture(image).save(buffer, "WEBP", quality=quality)
    return buffer.getvalue()


def decode(data: bytes, channels: int) -> np.ndarray:
    """Decode a file to uint8 [H, W, channels]."""
    with Image.open(io.BytesIO(data)) as picture:
        pixels = np.asarray(picture.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels)


def scan_bytes(data: bytes) -> int:
    """Count the bytes of a baseline JPEG between its start-of-scan header and its end-of-image marker."""
    start = data.index(b"\xff\xda") + 2
    return len(data) - 2 - start - int.from_bytes(data[start : start + 2], "big")


def byte_psnr(decoded: np.ndarray, originals: np.ndarray) -> float:
    """Return the mean over images of their PSNR in dB, uint8 [n, H, W, ch] each.

    An exact image has no finite PSNR: it counts as one with a single value off by one grey level.
    """
    difference = decoded.astype(np.float32) - originals.astype(np.float32)
    squared = (difference**2).reshape(len(originals), -1).sum(1, dtype=np.float64)  # [n]
    error = np.maximum(squared, 1) / originals[0].size
    return float((10 * np.log10(255**2 / error)).mean())


def _jpeg(image: np.ndarray, quality: int, optimize: bool) -> bytes:
    buffer = io.BytesIO()
    to_picture(image).save(buffer, "JPEG", quality=quality, optimize=optimize)
    return buffer.getvalue()
