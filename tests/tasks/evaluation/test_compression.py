"""Compression: rates are of real files and stored objects, distortions those of scikit-image."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from sklearn.datasets import load_digits

from functa.storage.functaset.quantizer import calibrate
from functa.storage.places.address import open_location
from functa.tasks.evaluation import compression
from functa.tasks.evaluation.compression import byte_psnr, decode, encode, rate_curve, scan_bytes, stored_bits
from functa.tasks.evaluation.evaluator_input import EvaluationJob, open_bench
from functa.tasks.evaluation.subset import float_subset


def pictures(channels: int, side: int = 48) -> np.ndarray:
    """Return smooth shapes with a little noise, uint8 [3, side, side, channels]."""
    y, x = np.mgrid[:side, :side] / side
    waves = [np.sin(9 * x + k) * np.cos(7 * y + c) for k in range(3) for c in range(channels)]
    images = np.stack(waves).reshape(3, channels, side, side).transpose(0, 2, 3, 1)
    noisy = 120 + 90 * images + np.random.default_rng(0).normal(0, 4, images.shape)
    return noisy.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("codec", "ending"), [("jpeg", "jpg"), ("webp", "webp")])
def test_rates_are_the_files_sizes_and_distortions_scikit_images(
    channels: int, codec: str, ending: str, tmp_path: Path
) -> None:
    images = pictures(channels)
    figures = rate_curve(images, codec, (20, 80))  # type: ignore[arg-type]
    for quality in (20, 80):
        sizes, decibels = [], []
        for number, image in enumerate(images):
            path = tmp_path / f"{number}-{quality}.{ending}"
            path.write_bytes(encode(image, codec, quality))  # type: ignore[arg-type]
            sizes.append(path.stat().st_size)
            with Image.open(path) as picture:
                decoded = np.asarray(picture.convert("L" if channels == 1 else "RGB")).reshape(image.shape)
            decibels.append(peak_signal_noise_ratio(image, decoded, data_range=255))
        assert figures[str(quality)]["bpp"] == 8 * sum(sizes) / (3 * 48 * 48)
        assert figures[str(quality)]["psnr"] == pytest.approx(np.mean(decibels), rel=1e-6)
    assert figures["20"]["bpp"] < figures["80"]["bpp"] and figures["20"]["psnr"] < figures["80"]["psnr"]


def test_a_scan_is_the_only_difference_of_two_jpegs_with_the_same_tables() -> None:
    """With standard tables, files of one quality and size are equal byte for byte but for the scan."""
    files = [_plain_jpeg(image) for image in pictures(3)]
    (first, second), lengths = files[:2], [len(data) - scan_bytes(data) for data in files]
    assert len(set(lengths)) == 1
    assert first[: lengths[0] - 2] == second[: lengths[0] - 2] and first[-2:] == second[-2:] == b"\xff\xd9"


def _plain_jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=50)
    return buffer.getvalue()


def test_an_exact_image_counts_as_one_value_off_by_one_level() -> None:
    image = pictures(1)[:1]
    off = image.copy()
    off[0, 5, 5, 0] += 1
    assert byte_psnr(image, image) == byte_psnr(off, image)
    assert byte_psnr(off, image) == pytest.approx(peak_signal_noise_ratio(image, off, data_range=255))


def test_grey_webp_comes_back_grey() -> None:
    image = (load_digits().images[0] * 15).astype(np.uint8)[..., None]
    assert decode(encode(image, "webp", 95), 1).shape == (8, 8, 1)
    assert byte_psnr(decode(encode(image, "webp", 95), 1)[None], image[None]) > 30


def test_the_rate_of_a_functaset_is_that_of_the_bytes_on_disk(evaluated: EvaluationJob, tmp_path: Path) -> None:
    bench = open_bench(evaluated)
    test = float_subset(bench, "test", 200)
    config = evaluated.quantization.model_copy(update={"bits": 6})
    quantizer = calibrate(config, test.z.numpy())
    assert quantizer is not None
    bits = stored_bits(open_location(str(tmp_path)), bench, test, quantizer, config)
    size = sum(path.stat().st_size for path in tmp_path.glob("fragments/*/z/c/**/*") if path.is_file())
    assert size > 0 and bits == pytest.approx(8 * size / test.z.numel())


def test_rates_and_distortions_of_latents(evaluated: EvaluationJob) -> None:
    figures = compression.measure(evaluated)
    ours = figures["compression"]
    assert ours.keys() == {"6", "4", "2"}
    for bits, point in ours.items():
        assert point["bpp_fixed"] == int(bits) * 32 / 64
        assert point["bpp"] < point["bpp_with_field"] < point["bpp_unamortised"]
    assert ours["6"]["bpp"] > ours["4"]["bpp"] > ours["2"]["bpp"]
    assert ours["6"]["psnr"] > ours["4"]["psnr"] > ours["2"]["psnr"]
    field = {"hidden": 64 * 2 + 64 + 2 * (64 * 64 + 64) + 64 + 1, "map": (8 + 1) * 3 * 64}
    assert figures["compression_of"] == {"images": 200, "field_shared_by": 400, "field_bytes": 4 * sum(field.values())}
    whole = 8 * (4 * sum(field.values()) + 2 * 4 * 32) / 64  # with the quantiser's two ranges, [2, 2, 8] each
    assert ours["4"]["bpp_unamortised"] - ours["4"]["bpp"] == pytest.approx(whole)
    assert ours["4"]["bpp_with_field"] - ours["4"]["bpp"] == pytest.approx(whole / 400)
