"""Ready-made fields: files that are what they were, and latents of images of any size."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import functa
from functa.models.config import FieldConfig, InnerConfig
from functa.models.field.field import Field
from functa.models.field.inner import InnerLoop
from functa.storage.errors import DamagedObject, StorageError
from functa.storage.places.address import open_location
from functa.tasks.inference.open_models import load_ready_field
from functa.tasks.inference.ready import shipped
from functa.tasks.inference.ready.field import ReadyField, ready_field
from functa.tasks.inference.ready.pack import pack
from tests.helpers.flows.trained_root import trained_root
from tests.helpers.tasks.ready_fields import write_ready


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of shipped fields, with one of them: patches of 4x4 pixels, 8 numbers."""
    monkeypatch.setattr(shipped, "FOLDER", str(tmp_path / "ready"))
    write_ready(tmp_path / "ready")
    return tmp_path / "ready"


def test_every_shipped_field_is_whole_and_small_enough() -> None:
    records = [shipped.check_pair(name) for name in shipped.names()]
    assert all(record.bytes <= shipped.MOST_BYTES for record in records)
    assert sum(record.bytes for record in records) <= shipped.MOST_BYTES_TOGETHER
    files = {path.name for path in Path(shipped.FOLDER).iterdir() if path.suffix in shipped.ENDINGS}
    assert files == {f"{record.name}{ending}" for record in records for ending in shipped.ENDINGS}


def test_a_field_is_loaded_by_its_name_or_by_the_path_of_either_file(folder: Path) -> None:
    found = [functa.load_field(text) for text in ("tiny", folder / "tiny.json", folder / "tiny.safetensors")]
    for each in found:
        assert isinstance(each, ReadyField)
        assert repr(each) == "ReadyField('tiny': each 4x4x3 pixels -> 8 numbers)"
        assert each.digest == shipped.find("tiny").digest


def test_latents_are_those_of_the_same_field_over_the_whole_image(folder: Path) -> None:
    """An image of 3x3 patches of a field with a grid of 3x3 positions has the latents of its patches, one by one."""
    ready = functa.load_field("tiny")
    assert isinstance(ready, ReadyField)
    images = np.random.default_rng(0).integers(0, 256, (2, 12, 12, 3), np.uint8)
    whole = Field(ready.module.config.model_copy(update={"spatial": 3}), ready.inner, 3)
    whole.load_state_dict(ready.module.state_dict())
    expected = InnerLoop(whole.requires_grad_(False), ready.inner, (12, 12)).encode(torch.from_numpy(images) / 255)
    z = ready.encode(images)
    np.testing.assert_allclose(z, expected.numpy(), atol=1e-6)
    decoded = ready.decode(z, dtype="float32")
    np.testing.assert_allclose(decoded, whole(expected, (12, 12)).numpy(), atol=1e-5)
    np.testing.assert_array_equal(functa.decode(ready, functa.encode("tiny", images)), ready.decode(z))


@pytest.mark.parametrize("size", [(4, 4), (5, 9), (8, 12), (13, 6)])
def test_images_of_any_size_come_back_at_their_own_size(folder: Path, size: tuple[int, int]) -> None:
    ready = functa.load_field("tiny")
    assert isinstance(ready, ReadyField)
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    z = ready.encode(image)
    assert z.shape == (-(-size[0] // 4), -(-size[1] // 4), 8)
    filled = image[np.arange(4 * z.shape[0]).clip(max=size[0] - 1)][:, np.arange(4 * z.shape[1]).clip(max=size[1] - 1)]
    np.testing.assert_allclose(ready.encode(filled), z, atol=1e-6)
    assert ready.decode(z, size).shape == image.shape
    np.testing.assert_array_equal(ready.decode(z, size), ready.decode(z)[: size[0], : size[1]])
    assert ready.decode(z, size, scale=2).shape == (2 * size[0], 2 * size[1], 3)


def test_a_list_of_images_of_several_sizes_gives_a_list(folder: Path) -> None:
    ready = functa.load_field("tiny")
    assert isinstance(ready, ReadyField)
    images = [np.random.default_rng(i).random((5 + i, 7, 3), np.float32) for i in range(3)]
    latents = ready.encode(images)
    again = ready.decode(latents, [image.shape[:2] for image in images])
    assert [image.shape for image in again] == [image.shape for image in images]
    np.testing.assert_allclose(latents[1], ready.encode(images[1]), atol=1e-6)


def test_more_inner_steps_than_were_trained_change_the_latents(folder: Path) -> None:
    ready = functa.load_field("tiny")
    assert isinstance(ready, ReadyField)
    image = np.random.default_rng(0).random((8, 8, 3), np.float32)
    errors = [np.square(ready.decode(ready.encode(image, steps=k), dtype="float32") - image).mean() for k in (1, 3, 10)]
    assert errors == sorted(errors, reverse=True)
    np.testing.assert_array_equal(ready.encode(image, steps=ready.inner.steps), ready.encode(image))


def test_what_does_not_fit_is_refused_in_one_line(folder: Path) -> None:
    ready = functa.load_field("tiny")
    assert isinstance(ready, ReadyField)
    for shape, fault in {
        (8, 8, 1): r"expected \[H, W, 3\] or \[n, H, W, 3\]; images.repeat\(3, axis=-1\) makes colour",
        (8, 3, 3): "images of 8x3 pixels: smaller than the field's patch of 4x4",
        (8, 8): "expected",
    }.items():
        with pytest.raises(ValueError, match=fault):
            ready.encode(np.zeros(shape, np.uint8))
    z = ready.encode(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="size 8x9: 2x2 latent positions of 4 pixels are of another size"):
        ready.decode(z, (8, 9))
    with pytest.raises(ValueError, match=r"expected float32 \[h, w, 8\]"):
        ready.decode(z[..., :4])


def test_an_unknown_name_is_refused_with_the_nearest_one(folder: Path) -> None:
    with pytest.raises(shipped.UnknownField, match="unknown field 'tinny': did you mean 'tiny'"):
        functa.load_field("tinny")


@pytest.mark.attacks
def test_altered_files_are_refused(folder: Path) -> None:
    tensors, record = folder / "tiny.safetensors", folder / "tiny.json"
    whole, described = tensors.read_bytes(), json.loads(record.read_text())
    tensors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DamagedObject, match=r"tiny\.safetensors: was altered"):
        functa.load_field("tiny")
    tensors.write_bytes(whole[:-8])
    with pytest.raises(DamagedObject, match="was altered"):
        shipped.check_pair("tiny")
    tensors.write_bytes(whole)
    for change in ({"patch": 0}, {"sha256": "no"}, {"other": 1}, {"field": described["field"] | {"spatial": 2}}):
        record.write_text(json.dumps(described | change))
        with pytest.raises(DamagedObject, match="does not describe a field"):
            functa.load_field("tiny")


def test_a_field_too_large_to_be_shipped_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="ready-made field has 3145728 at most"):
        write_ready(tmp_path, width=1024)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a field of digits: patches of 2x2 pixels."""
    overrides = ("field.spatial=4", "field.channels=3")
    return Path(trained_root(tmp_path_factory.mktemp("root"), *overrides, stages=("meta_train",)).root)


def test_a_trained_field_is_packed_and_encodes_as_before(root: Path, tmp_path: Path) -> None:
    card = {"data": "digits", "command": "functa meta-train digits", "limits": "digits", "licence": "BSD"}
    record = pack(str(root), "own", str(tmp_path), card)
    assert (record.patch, record.image_channels, record.field.spatial) == (2, 1, 1)
    assert abs(record.card.figures["dB lost by float16"]) < 0.05
    assert record.card.training.startswith("20 steps of ")
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    packed, own = functa.load_field(tmp_path / "own.json"), functa.load_field(root)
    assert np.abs(packed.encode(images) - own.encode(images)).mean() < 1e-2, "rounded to float16"
    np.testing.assert_allclose(load_ready_field(root).encode(images), own.encode(images), atol=1e-6)


def test_the_loss_over_the_image_is_that_of_the_patch_with_smaller_steps() -> None:
    config, inner = FieldConfig(spatial=2, channels=4, width=16, depth=3), InnerConfig(loss="image", rates_clip=(0, 1))
    field = Field(config, inner, 1, seed=1).requires_grad_(False)
    images = torch.rand(2, 8, 8, 1)
    expected = InnerLoop(field, inner, (8, 8)).encode(images)
    ready = ready_field("own", field, inner, 8, "d")
    np.testing.assert_allclose(ready.encode(images), expected.numpy(), atol=1e-7)


@pytest.mark.parametrize("settings", [{"interpolation": "bilinear"}, {"kernel": 3}, {"coordinates": "global"}], ids=str)
def test_a_field_that_ties_patches_is_no_field_for_any_size(settings: dict[str, str]) -> None:
    inner = InnerConfig()
    config = FieldConfig.model_validate({"spatial": 2, "channels": 4, "width": 16, "depth": 3} | settings)
    with pytest.raises(StorageError, match="knows images of one size only"):
        ready_field("own", Field(config, inner, 1, resolution=(8, 8)), inner, 8, "d")


def test_a_copied_pair_is_enough(folder: Path, tmp_path: Path) -> None:
    for ending in shipped.ENDINGS:
        shutil.copy(folder / f"tiny{ending}", tmp_path)
    image = np.zeros((4, 4, 3), np.uint8)
    np.testing.assert_array_equal(
        functa.load_field(tmp_path / "tiny.json").encode(image), functa.load_field("tiny").encode(image)
    )
    assert shipped.read_record(open_location(str(tmp_path)), "tiny") == shipped.find("tiny")


def test_rates_of_their_own_for_every_step_come_along() -> None:
    config, inner = FieldConfig(spatial=2, channels=4, width=16, depth=3), InnerConfig(rates_per_step=True)
    field = Field(config, inner, 1, seed=1).requires_grad_(False)
    images = torch.rand(2, 8, 8, 1)
    ready = ready_field("own", field, inner, 8, "d")
    for steps in (3, 5):  # those beyond take the last
        more = inner.model_copy(update={"steps": steps})
        expected = InnerLoop(field, more, (8, 8)).encode(images)
        np.testing.assert_allclose(ready.encode(images, steps=steps), expected.numpy(), atol=1e-6)


def test_a_field_whose_tokens_talk_is_no_field_for_any_size() -> None:
    config = FieldConfig(spatial=2, channels=4, width=16, depth=3, mixer=1, mixer_width=8)
    with pytest.raises(StorageError, match="knows images of one size only"):
        ready_field("own", Field(config, InnerConfig(), 1), InnerConfig(), 8, "d")
