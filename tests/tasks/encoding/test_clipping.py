"""Latents outside the quantiser's range: refused if many, stored with their true PSNR, and named."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from functa.models.field.inner import InnerLoop
from functa.models.measures.metrics import psnr_of_errors
from functa.storage.config import QuantizationConfig
from functa.storage.errors import StorageError
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.quantizer import calibrate, clip_limit
from functa.storage.images.source import open_images
from functa.storage.places.address import open_location
from functa.storage.upkeep.requantize import requantize
from functa.tasks.encoding.encode import encode_group, encode_images
from functa.tasks.encoding.keyed_images import PlannedImages, of_split
from functa.tasks.encoding.plan import EncodeJob, plan
from functa.tasks.inputs.pictures import as_float
from functa.tasks.trained import load_field
from tests.helpers.tasks.encoding import encode, encode_job

LIMITED = "encode.quantization.max_clip_fraction=0.01"


def put(folder: Path, names: range, hard: bool, split: str = "train") -> None:
    """Write dull or contrasty images."""
    for name in names:
        draw = np.random.default_rng(name)
        pixels = draw.integers(0, 2, (8, 8)) * 255 if hard else draw.integers(100, 156) + draw.integers(-6, 7, (8, 8))
        path = folder / split / "ab"[name % 2] / f"{name:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)


def dull_source(tmp_path: Path, count: int = 48) -> None:
    put(tmp_path / "x", range(count), hard=False)
    put(tmp_path / "x", range(900, 908), hard=False, split="test")


def job(field: Path, tmp_path: Path, *overrides: str) -> EncodeJob:
    return encode_job(
        field, tmp_path / "s", "images.source=folder", "images.channels=1", f"images.location={tmp_path / 'x'}",
        "encode.shard_rows=16", "encode.chunk_rows=16", "encode.calibration_images=512", "encode.quantization.bits=8",
        "encode.quantization.range=minmax", *overrides,
    )[0]  # fmt: skip


def stored_psnr(work: EncodeJob, clipped_only: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Return the PSNR that is stored of training rows with clipped numbers, and that of their stored latents."""
    latents = Functaset.open(work.functaset).load("train")
    field, inner, _ = load_field(work.field)
    images = PlannedImages(work.images, work.encode.augmentation, (8, 8, 1))
    table = of_split(open_images(work.images).split("train"), work.encode.augmentation.count)
    position = {name: row for row, name in enumerate(zip(table.keys, table.augmentations.tolist(), strict=True))}
    names = zip(latents.keys, latents.augmentation.tolist(), strict=True)
    pixels = images.read(table.take([position[name] for name in names])).images
    loop = InnerLoop(field, inner, (8, 8))
    errors = loop.errors_at(as_float(pixels), torch.from_numpy(latents.dequantized()))
    z, _ = encode_images(loop, pixels, 32)
    quantizer = latents.shards[0].fragment.quantizer
    assert quantizer is not None
    rows = quantizer.outside(z.numpy()) > 0
    assert rows.any()
    chosen = rows if clipped_only else ~rows
    return latents.psnr[chosen], psnr_of_errors(errors).numpy()[chosen]


@pytest.mark.faults
@pytest.mark.parametrize("granularity", ["element", "channel", "scalar"])
def test_later_images_outside_the_range_are_refused_with_what_to_do(
    field: Path, tmp_path: Path, granularity: str
) -> None:
    dull_source(tmp_path)
    work = job(field, tmp_path, LIMITED, f"encode.quantization.granularity={granularity}")
    assert encode(work)["info"]["clip_fraction"] == 0
    put(tmp_path / "x", range(100, 140), hard=True)
    with pytest.raises(StorageError, match=r"outside the quantiser's range.*encode all images into a new --root"):
        encode(work)
    assert Functaset.open(work.functaset).version == 1
    assert Functaset.open(work.functaset).rows("train") == 48


def test_the_limit_counts_rows_whatever_their_shards(field: Path, tmp_path: Path) -> None:
    """A shard of one row may have more outside the range than all shards together."""
    dull_source(tmp_path)
    encode(job(field, tmp_path, LIMITED))
    put(tmp_path / "x", range(100, 140), hard=True)
    loose = job(
        field, tmp_path, "encode.quantization.max_clip_fraction=1", "encode.shard_rows=1", "encode.chunk_rows=1"
    )
    todo = plan(loose)
    for group in todo.groups:
        encode_group(loose, group, 100)
    from functa.tasks.encoding.finalise import finalise

    with pytest.raises(StorageError, match="of 40 rows lie outside"):
        finalise(job(field, tmp_path, LIMITED), todo)


def test_a_single_image_far_outside_is_refused_alone(field: Path, tmp_path: Path) -> None:
    dull_source(tmp_path)
    work = job(field, tmp_path, LIMITED)
    encode(work)
    put(tmp_path / "x", range(100, 101), hard=True)
    with pytest.raises(StorageError, match="of 1 rows lie outside"):
        encode(work)


def test_clipped_images_that_the_user_allows_keep_the_psnr_of_their_stored_latents(field: Path, tmp_path: Path) -> None:
    dull_source(tmp_path)
    encode(job(field, tmp_path, LIMITED))
    put(tmp_path / "x", range(100, 140), hard=True)
    work = job(field, tmp_path, "encode.quantization.max_clip_fraction=1")
    info = encode(work)["info"]
    assert info["clip_fraction_worst"] > info["clip_fraction"] > 0.01
    stored, measured = stored_psnr(work)
    np.testing.assert_allclose(stored, measured, rtol=1e-4)


def test_a_single_image_far_outside_the_first_encoding_is_named_and_keeps_its_true_psnr(
    field: Path, tmp_path: Path
) -> None:
    dull_source(tmp_path, 120)
    put(tmp_path / "x", range(501, 502), hard=True)
    work = job(field, tmp_path, "encode.quantization.range=sigma", "encode.quantization.sigma=3",
               "encode.quantization.max_clip_fraction=0.05", "encode.shard_rows=256")  # fmt: skip
    todo = plan(work)
    stats = [encode_group(work, group, 201) for group in todo.groups]
    named = {key: share for each in stats for key, share in each["outside"].items()}
    assert named.keys() == {"train/b/0501.png"}
    from functa.tasks.encoding.finalise import finalise

    finalise(work, todo)
    stored, measured = stored_psnr(work)
    np.testing.assert_allclose(stored, measured, rtol=1e-4)


def test_augmented_rows_are_measured_as_stored_too(field: Path, tmp_path: Path) -> None:
    augmented = ("encode.augmentation.count=2", "encode.augmentation.padding=1")
    dull_source(tmp_path)
    encode(job(field, tmp_path, "encode.quantization.max_clip_fraction=1", *augmented))
    put(tmp_path / "x", range(100, 120), hard=True)
    work = job(field, tmp_path, "encode.quantization.max_clip_fraction=1", *augmented)
    encode(work)
    stored, measured = stored_psnr(work)
    assert len(stored) > 20
    np.testing.assert_allclose(stored, measured, rtol=1e-4)


def test_images_inside_the_range_keep_the_psnr_of_their_latents_before_quantisation(
    field: Path, tmp_path: Path
) -> None:
    dull_source(tmp_path)
    coarse = job(field, tmp_path, LIMITED, "encode.quantization.bits=2", "encode.quantization.margin=1")
    encode(coarse)
    exact = coarse.model_copy(update={
        "functaset": str(tmp_path / "exact"),
        "encode": coarse.encode.model_copy(update={"quantization": QuantizationConfig(bits=32)}),
    })  # fmt: skip
    encode(exact)
    one, other = (Functaset.open(work.functaset).load("train") for work in (coarse, exact))
    assert one.keys == other.keys
    np.testing.assert_array_equal(one.psnr, other.psnr)


def test_a_copy_at_fewer_bits_is_refused_where_its_range_clips_too_much(field: Path, tmp_path: Path) -> None:
    dull_source(tmp_path)
    put(tmp_path / "x", range(100, 140), hard=True)
    work = job(field, tmp_path, "encode.quantization.bits=32")
    encode(work)
    narrow = QuantizationConfig(bits=6, range="sigma", sigma=0.5)
    with pytest.raises(StorageError, match="outside the quantiser's range"):
        requantize(Functaset.open(work.functaset), open_location(str(tmp_path / "q")), narrow)


def test_few_rows_may_exceed_the_limit_by_chance_and_many_may_not() -> None:
    assert clip_limit(0.01, 1) == pytest.approx(0.05)
    assert clip_limit(0.01, 10_000) == pytest.approx(0.0104)
    assert clip_limit(0.0, 1) == 0
    assert clip_limit(1.0, 1) == 1


def test_numbers_outside_the_range_are_counted_by_row() -> None:
    z = np.random.default_rng(0).normal(size=(50, 2, 2, 3)).astype(np.float32)
    quantizer = calibrate(QuantizationConfig(bits=8, granularity="channel", margin=0), z)
    assert quantizer is not None
    assert quantizer.outside(z).sum() <= 6  # the ends themselves, rounded
    z[7, 0, :, :] *= 100
    z[8] = np.nan
    counts = quantizer.outside(z)
    assert counts[7] >= 5 and counts[8] == 0
    assert counts.sum() == quantizer.encode(np.delete(z, 8, 0))[1]
