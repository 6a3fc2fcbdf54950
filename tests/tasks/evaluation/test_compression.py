"""Reconstruction and compression: rates are of real files and stored objects, distortions those of scikit-image."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from sklearn.datasets import load_digits

from functa.storage.functaset.quantizer import calibrate
from functa.storage.places.address import open_location
from functa.tasks.evaluation import compression, reconstruction
from functa.tasks.evaluation.bench import EvaluationJob, Messages, open_bench, read_arrays
from functa.tasks.evaluation.compression import byte_psnr, decode, encode, rate_curve, scan_bytes, stored_bits
from functa.tasks.evaluation.subset import float_subset, stored_subset
from functa.tasks.report.blocks import ReportData, Sheet, Table
from functa.tasks.report.sections import report_sections
from functa.tasks.report.sections.compression import psnr_at, section
from tests.helpers.tasks.encoded import encoded


def pictures(channels: int, side: int = 48) -> np.ndarray:
    """Smooth shapes with a little noise, uint8 [3, side, side, channels]."""
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
    """With one quality and size all but the scan is the same, byte for byte, where the tables are the standard ones."""
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


def test_psnr_at_a_rate_is_linear_in_its_logarithm_and_never_extrapolated() -> None:
    points = [(0.1, 20.0), (1.0, 30.0), (4.0, 36.0)]
    assert psnr_at(points, 10**-0.5) == pytest.approx(25)
    assert psnr_at(points, 2.0) == pytest.approx(33)
    assert psnr_at(points, 4.0) == pytest.approx(36)
    assert psnr_at(points, 0.09) is None and psnr_at(points, 4.1) is None


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> EvaluationJob:
    """A float32 functaset of 200 digits per split under a field of 20 steps."""
    folder = tmp_path_factory.mktemp("compression")
    few = ["evaluation.bits=[6,4,2]", "evaluation.compression.jpeg=[50]", "evaluation.compression.webp=[50]"]
    config, work = encoded(folder, *few)
    return EvaluationJob(
        seed=0, images=config.images, quantization=config.encode.quantization, evaluation=config.evaluation,
        calibration_images=200, functaset=work.functaset, field=work.field, output=str(folder / "run"), device="cpu",
    )  # fmt: skip


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


def test_psnr_is_measured_of_both_splits_and_after_every_inner_step(evaluated: EvaluationJob) -> None:
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


def _psnr(found: torch.Tensor, images: torch.Tensor) -> float:
    pairs = zip(images.numpy(), found.numpy(), strict=True)
    return float(np.mean([peak_signal_noise_ratio(image, other, data_range=1) for image, other in pairs]))


def test_the_worst_and_the_best_images_are_shown_with_their_psnr(evaluated: EvaluationJob) -> None:
    reported: list[tuple[str, int, int]] = []
    metrics = reconstruction.measure(evaluated, Messages(lambda *row: reported.append(row)))
    ends = {what: (done, total) for what, done, total in reported}  # the last of each part
    assert set(ends) == {"test images", "training images", "test images by inner step", "train images by inner step"}
    assert all(done == total for done, total in ends.values())
    arrays = read_arrays(evaluated.output, "reconstruction")
    order = np.sort(arrays["psnr"])
    np.testing.assert_array_equal(arrays["worst_psnr"], order[:8])
    np.testing.assert_array_equal(arrays["best_psnr"], order[::-1][:8])
    data = ReportData(title="", metrics=metrics, arrays={"reconstruction": arrays}, psnr_per_image=arrays["psnr"])
    sections = report_sections(data)
    blocks = {block.name: block for section in sections for block in section.blocks if block.name}
    assert blocks.keys() == {"psnr_histogram", "psnr_by_step", "reconstructions_worst", "reconstructions_best"}
    worst = blocks["reconstructions_worst"]
    assert isinstance(worst, Sheet)
    assert worst.rows[2].captions[0] == f"{order[0]:.1f}" and len(worst.rows[0].images) == 8


def test_a_baseline_of_as_many_numbers_as_values_is_left_out(evaluated: EvaluationJob) -> None:
    bench = open_bench(evaluated)
    assert reconstruction.baselines(bench).keys() == {"psnr_pca_patch", "psnr_pca_image"}
    config = bench.field.config
    bench.field.config = config.model_copy(update={"channels": 16})  # 16 numbers for 4x4 pixels
    assert reconstruction.baselines(bench) == {}


def test_rate_and_distortion_are_a_plot_and_two_tables() -> None:
    jpeg = {"50": {"bpp": 1.0, "bpp_scan": 0.5, "psnr": 30.0}, "90": {"bpp": 2.0, "bpp_scan": 1.5, "psnr": 36.0}}
    webp = {"50": {"bpp": 1.9, "psnr": 33.0}}
    point = {"bpp": 2**0.5, "bpp_fixed": 1.5, "bpp_with_field": 1.6, "bpp_unamortised": 99.0, "psnr": 31.0}
    metrics = {"compression": {"8": point}, "compression_jpeg": jpeg, "compression_webp": webp}
    shown = section(ReportData(title="", metrics=metrics))
    assert shown is not None and [b.name for b in shown.blocks] == [
        "rate_distortion", "compression", "compression_files",
    ]  # fmt: skip
    ours, files = shown.blocks[1:]
    assert isinstance(ours, Table) and isinstance(files, Table)
    assert ours.rows == (("8", 1.414, 31.0, 33.0, "–", 35.68, 1.5, 1.6, 99.0),)
    assert files.rows[-1] == ("WebP", 50, 1.9, 33.0)
    assert section(ReportData(title="an old run", metrics={"psnr_test": 30.0})) is None


def test_stored_latents_are_those_of_their_images(evaluated: EvaluationJob) -> None:
    """Also of a subset, whose order is the store's."""
    bench = open_bench(evaluated)
    for split, count in (("train", 50), ("test", 10_000)):
        subset = stored_subset(bench, split, count)
        assert len(subset) == len(set(subset.rows.tolist())) and abs(len(subset) - min(count, 200)) < 8
        encoded = bench.loop.encode(subset.pixels(np.arange(len(subset))))
        np.testing.assert_allclose(subset.z, encoded, rtol=1e-3, atol=1e-5)
