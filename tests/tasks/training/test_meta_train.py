"""Meta-training: micro-batches, ranks, random patches, validation, and fields of another config."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from functa.flows.config.load import load_config
from functa.flows.config.schema import PipelineConfig
from functa.models.field.field import Field
from functa.models.field.inner import InnerLoop
from functa.models.measures.metrics import psnr_of_errors
from functa.storage.config import ImagesConfig
from functa.storage.errors import StorageError
from functa.storage.images.source import open_images
from functa.tasks.inputs.pictures import Pictures
from functa.tasks.trained import load_field, refuse_other_field
from functa.tasks.training import meta_train
from functa.tasks.training.meta_train import random_positions
from functa.tasks.training.ranks import Ranks
from functa.tasks.training_jobs import MetaTrainJob

SMALL = ["field.width=16", "meta_train.steps=4", "meta_train.warmup=0", "meta_train.batch=11", "meta_train.log_every=1"]


def config(*overrides: str) -> PipelineConfig:
    return load_config("digits", [*SMALL, *overrides])


def job(output: Path | str, *overrides: str) -> MetaTrainJob:
    made = config(*overrides)
    return MetaTrainJob(
        seed=0, images=made.images, field=made.field, inner=made.inner, meta_train=made.meta_train, device="cpu",
        output=str(output), digest="d",
    )  # fmt: skip


def one_step(made: MetaTrainJob, ranks: Ranks = Ranks()) -> tuple[dict[str, float], list[torch.Tensor]]:  # noqa: B008
    """Return figures and gradients of step 2."""
    pictures = Pictures(open_images(made.images), "train", made.images)
    loop = InnerLoop(Field(made.field, made.inner, pictures.channels, 0), made.inner, pictures.resolution)
    figures = meta_train._outer_step(made, loop, pictures, ranks)(2, torch.Generator())
    return {k: v.item() for k, v in figures.items()}, [p.grad for p in loop.field.parameters()]  # type: ignore[misc]


@pytest.mark.parametrize("patches", ["null", "2"])
@pytest.mark.parametrize("rates", ["channel", "element"])
def test_micro_batches_give_the_gradient_of_the_whole_batch(patches: str, rates: str) -> None:
    overrides = [f"meta_train.patches_per_image={patches}", f"inner.rates={rates}"]
    figures, gradients = one_step(job("", *overrides))
    parted, accumulated = one_step(job("", *overrides, "meta_train.micro_batch=4"))
    assert parted == pytest.approx(figures, rel=1e-5)
    for whole, parts in zip(gradients, accumulated):
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)


def test_the_parts_of_ranks_add_up_to_the_whole_batch() -> None:
    figures, gradients = one_step(job("", "meta_train.patches_per_image=2"))
    parts = [one_step(job("", "meta_train.patches_per_image=2"), Ranks(rank, 3)) for rank in range(3)]
    assert sum(part[0]["psnr_train"] for part in parts) == pytest.approx(figures["psnr_train"], rel=1e-5)
    for i, whole in enumerate(gradients):
        torch.testing.assert_close(sum(part[1][i] for part in parts), whole, rtol=0, atol=1e-6)


def test_drawing_all_patches_equals_training_on_all_patches() -> None:
    """Another path through the code with the same result."""
    figures, gradients = one_step(job(""))
    drawn, drawn_gradients = one_step(job("", "meta_train.patches_per_image=4"))
    assert drawn == pytest.approx(figures, rel=1e-5)
    for one, other in zip(gradients, drawn_gradients):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_random_patches_never_repeat_within_an_image_and_are_equally_frequent() -> None:
    counts = torch.zeros(16)
    for seed in range(200):
        positions = random_positions(25, 16, 5, seed)
        assert positions.shape == (25, 5)
        assert all(len(set(row)) == 5 for row in positions.tolist())
        counts += torch.bincount(positions.flatten(), minlength=16)
    expected = 200 * 25 * 5 / 16
    assert ((counts - expected).abs() < 5 * expected**0.5).all()
    assert not torch.equal(random_positions(25, 16, 5, 0), random_positions(25, 16, 5, 1))
    with pytest.raises(ValueError, match=r"meta_train\.patches_per_image=17, but an image has 16 patches"):
        random_positions(25, 16, 17, 0)


def test_rows_carry_the_training_psnr_of_their_batch(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    meta_train.run(job(tmp_path, "meta_train.batch=1", "meta_train.validation_images=0"), rows.append)
    (row,) = [row for row in rows if row.get("step") == 4]
    assert row["psnr_train"] == pytest.approx(-10 * np.log10(row["loss"]), rel=1e-5)  # of one image


@pytest.mark.parametrize("validation_images", [5, 11, 30])
def test_validation_counts_every_image_once_for_any_batch_size(validation_images: int) -> None:
    made = job("", f"meta_train.validation_images={validation_images}", "meta_train.micro_batch=7")
    images = open_images(made.images)
    pictures = Pictures(images, "test", made.images, limit=validation_images)
    field = Field(made.field, made.inner, 1, 0)
    loop = InnerLoop(field, made.inner, (8, 8))
    evaluate = meta_train._validation(made, images, loop, Ranks(), lambda row: None)
    assert evaluate is not None
    expected = psnr_of_errors(loop.errors(pictures.batch(np.arange(len(pictures))))).mean().item()
    assert evaluate(field)["psnr"] == pytest.approx(expected, rel=1e-5)


def test_images_read_on_demand_train_the_same_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefetching changes nothing."""
    figures = [meta_train.run(job(tmp_path / "memory"), lambda _: None)]
    monkeypatch.setattr("functa.tasks.inputs.pictures.MEMORY_BYTES", 0)
    assert not Pictures(open_images(ImagesConfig(source="digits")), "train", ImagesConfig(source="digits")).in_memory
    figures.append(meta_train.run(job(tmp_path / "demand"), lambda _: None))
    assert figures[0]["weights_digest"] == figures[1]["weights_digest"]


def test_a_field_of_another_config_is_refused_naming_the_keys(tmp_path: Path) -> None:
    meta_train.run(job(tmp_path), lambda _: None)
    made = config()
    other = config("field.channels=4", "field.w0=20").field
    message = r"holds another field \(channels is 8 there and 4 here, w0 is 10\.0 there and 20\.0 here\)"
    with pytest.raises(StorageError, match=message):
        refuse_other_field(str(tmp_path), load_field(str(tmp_path))[2], other)
    with pytest.raises(StorageError, match=message):  # a finished field is never deleted
        meta_train.run(job(tmp_path, "field.channels=4", "field.w0=20"), lambda _: None)
    assert load_field(str(tmp_path))[0].config == made.field


def test_a_field_stored_before_a_config_key_existed_is_accepted() -> None:
    stored = {k: v for k, v in config().field.model_dump(mode="json").items() if k != "axes"}
    refuse_other_field("here", {"field": stored}, config().field)


def test_a_diverging_field_is_reported_while_it_trains() -> None:
    """Its loss stays finite, so nothing else would report it before the last step."""
    made, notes = job("", "meta_train.validation_images=16"), []
    images = open_images(made.images)
    pictures = Pictures(images, "train", made.images)
    field = Field(made.field, made.inner, pictures.channels, 0)
    loop = InnerLoop(field, made.inner, pictures.resolution)
    evaluate = meta_train._validation(made, images, loop, Ranks(), notes.append)
    assert evaluate is not None
    before = evaluate(field)["psnr"]
    assert evaluate(field)["psnr"] == before and not notes
    with torch.no_grad():
        field.biases[-1] += 1.0
    after = evaluate(field)["psnr"]
    assert after < before - 3
    assert len(notes) == 1
    assert f"fell from {before:.1f} to {after:.1f} dB" in notes[0]["note"] and "learning_rate" in notes[0]["note"]
