"""Encoding: plan, shards, finalise. What is stored is what the field says, whoever runs it and however often."""

from pathlib import Path

import numpy as np
import pytest
import torch

from flows.config import PipelineConfig, load_config
from models.inner import InnerLoop
from storage.errors import StorageError
from storage.functaset import Functaset
from storage.images import open_images
from tasks.encoding.finalise import finalise
from tasks.encoding.group import encode_group, encode_images
from tasks.encoding.plan import EncodeJob, plan
from tasks.training.meta_train import MetaTrainJob, load_field
from tasks.training.meta_train import run as train_field
from tests.flows.tiny import TINY


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("field")
    config = load_config("digits", TINY)
    train_field(
        MetaTrainJob(
            seed=0, images=config.images, field=config.field, inner=config.inner, meta_train=config.meta_train,
            device="cpu", output=str(folder), digest="d",
        ),
        lambda row: None,
    )  # fmt: skip
    return folder


def job(field: Path, store: Path, *overrides: str) -> tuple[EncodeJob, PipelineConfig]:
    config = load_config("digits", [*TINY, *overrides])
    return EncodeJob(
        images=config.images, encode=config.encode, field=str(field), field_digest="feed", functaset=str(store),
        device="cpu",
    ), config  # fmt: skip


def encode(work: EncodeJob) -> dict:  # type: ignore[type-arg]
    groups = plan(work)
    for group in groups:
        encode_group(work, group, 400)
    return finalise(work, groups)


def bytes_of(store: Path) -> dict[str, bytes]:
    return {str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()}


def test_a_stored_latent_is_that_of_its_image(field: Path, tmp_path: Path) -> None:
    work, _ = job(field, tmp_path / "s", "encode.quantization.bits=32")
    encode(work)
    stored = Functaset.open(str(tmp_path / "s")).load("test")
    images = open_images(work.images).split("test")
    batch = images.read(stored.source_rows)
    module, inner, _ = load_field(str(field))
    expected = InnerLoop(module, inner, (8, 8)).encode(torch.from_numpy(batch.images).float() / 255)
    np.testing.assert_allclose(stored.dequantized(), expected.numpy(), atol=1e-5)
    np.testing.assert_array_equal(stored.labels, np.asarray(images.labels)[stored.source_rows])


def test_the_stored_psnr_is_that_of_the_reconstruction(field: Path, tmp_path: Path) -> None:
    work, _ = job(field, tmp_path / "s", "encode.quantization.bits=32")
    encode(work)
    stored = Functaset.open(str(tmp_path / "s")).load("test")
    pixels = torch.from_numpy(open_images(work.images).split("test").read(stored.source_rows).images).float() / 255
    module, _, _ = load_field(str(field))
    errors = (module(torch.from_numpy(stored.dequantized()), (8, 8)) - pixels).square().mean((1, 2, 3))
    np.testing.assert_allclose(stored.psnr, -10 * np.log10(errors.numpy()), atol=1e-3)


def test_eight_bits_are_within_half_a_step_of_float32(field: Path, tmp_path: Path) -> None:
    for bits in (8, 32):
        encode(job(field, tmp_path / str(bits), f"encode.quantization.bits={bits}")[0])
    coded, exact = (Functaset.open(str(tmp_path / str(bits))).load("train") for bits in (8, 32))
    np.testing.assert_array_equal(coded.ids, exact.ids)
    (_, quantizer), *_ = coded.parts
    assert quantizer is not None
    outside = np.abs(coded.dequantized() - exact.dequantized()) > quantizer.step * 0.5001
    assert outside.mean() < 0.01  # clipped ones, counted in the receipts


def test_encoding_twice_changes_no_byte(field: Path, tmp_path: Path) -> None:
    work, _ = job(field, tmp_path / "s")
    encode(work)
    before = bytes_of(tmp_path / "s")
    encode(work)
    assert bytes_of(tmp_path / "s") == before


def test_groups_in_any_order_give_the_same_latents(field: Path, tmp_path: Path) -> None:
    contents = []
    for name, turn in (("a", 1), ("b", -1)):
        work, _ = job(field, tmp_path / name)
        groups = plan(work)
        for group in groups[::turn]:
            encode_group(work, group, 400)
        finalise(work, groups)
        contents.append({k: v for k, v in bytes_of(tmp_path / name).items() if "/c/" in k})
    assert contents[0] == contents[1]


def test_nothing_is_visible_before_all_shards_are_done(field: Path, tmp_path: Path) -> None:
    work, _ = job(field, tmp_path / "s")
    groups = plan(work)
    for group in groups[:-1]:
        encode_group(work, group, 400)
    with pytest.raises(StorageError):
        Functaset.open(str(tmp_path / "s"))
    with pytest.raises(StorageError, match="shard"):
        finalise(work, groups)


def test_another_field_is_refused_by_the_functaset(field: Path, tmp_path: Path) -> None:
    work, _ = job(field, tmp_path / "s")
    encode(work)
    with pytest.raises(StorageError, match="field: 'feed' -> 'beef'"):
        plan(work.model_copy(update={"field_digest": "beef"}))


def test_images_that_the_field_was_not_trained_on_are_refused(field: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.zeros((20, 16, 16), np.uint8), labels=np.arange(20) % 2)
    with pytest.raises(StorageError, match="trained on 8x8 images of 1 channels, these are 16x16 of 1"):
        plan(job(field, tmp_path / "s", "images.source=npz", f"images.location={tmp_path}/x.npz")[0])


def test_an_image_has_the_same_latent_in_any_batch(field: Path) -> None:
    """The last batch is filled up, so every call has one shape."""
    module, inner, _ = load_field(str(field))
    loop = InnerLoop(module, inner, (8, 8))
    images = np.random.default_rng(0).integers(0, 255, (13, 8, 8, 1), dtype=np.uint8)
    z, errors = encode_images(loop, images, 8)
    alone, _ = encode_images(loop, images[11:12], 8)
    torch.testing.assert_close(z[11:12], alone)
    assert len(z) == len(errors) == 13
