"""Augmentations: their operations, their dependence on (seed, image, number) only, and their rows."""

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from functa.models.config import NormalizationConfig
from functa.storage.config import ImagesConfig
from functa.storage.functaset.commit import retire
from functa.storage.functaset.functaset import Functaset
from functa.storage.images.files import Decoded
from functa.storage.images.source import open_images
from functa.storage.places.address import open_location
from functa.storage.upkeep.verify import verify
from functa.tasks.config import AugmentationConfig
from functa.tasks.encoding.augment import Augmentation, _box
from functa.tasks.encoding.keyed_images import PlannedImages, of_split
from functa.tasks.inputs.batches import training_batches
from functa.tasks.inputs.latents import load_split, training_normalizer
from functa.tasks.training.ranks import Ranks
from tests.helpers.tasks.encoding import encode, encode_job, flip_bit, repair


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    shape = (height, width) if mode == "L" else (height, width, 3)
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, shape, np.uint8))


def test_crops_are_equally_likely_windows_of_the_padded_image_and_half_are_mirrored() -> None:
    image = picture(8, 8)
    pixels = np.pad(np.asarray(image), ((2, 2), (2, 2), (0, 0)))
    windows = {(y, x): pixels[y : y + 8, x : x + 8] for y in range(5) for x in range(5)}
    known = {(window[:, ::-1] if m else window).tobytes(): (at, m) for at, window in windows.items() for m in (0, 1)}
    augment = Augmentation(AugmentationConfig(count=1, padding=2), 8)
    found = [known[augment.view("a", number)(Decoded.of(image)).tobytes()] for number in range(1, 2001)]
    counts = Counter(at for at, _ in found)
    assert len(counts) == 25
    assert sum((count - 80) ** 2 / 80 for count in counts.values()) < 52  # chi-squared, 24 degrees: 0.1 %
    assert abs(sum(mirrored for _, mirrored in found) - 1000) < 74  # 3.3 standard deviations
    assert np.array_equal(augment.view("a", 0)(Decoded.of(image)), np.asarray(image))


def test_boxes_have_the_configured_areas_and_shapes_and_stay_inside() -> None:
    config = AugmentationConfig(count=1, kind="distort", area=(0.2, 0.6), ratio=(0.5, 2))
    draw = np.random.default_rng(0)
    boxes = np.array([_box((300, 200), config, draw) for _ in range(1000)])
    left, top, width, height = boxes.T
    assert (left >= 0).all() and (top >= 0).all()
    assert (left + width <= 300 + 1e-9).all() and (top + height <= 200 + 1e-9).all()
    area, ratio = width * height / 60_000, width / height
    assert 0.2 <= area.min() < 0.21 and 0.55 < area.max() <= 0.6 + 1e-9
    assert 0.5 <= ratio.min() < 0.6 and 1.7 < ratio.max() <= 2
    narrow = _box((1000, 1), config, draw)  # nothing fits: the largest allowed shape, in the middle
    assert narrow == (499, 0, 2, 1)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", ["crop", "distort"])
def test_an_augmentation_depends_on_seed_image_and_number_only(kind: str, mode: str) -> None:
    image = picture(40, 30, mode)
    config = AugmentationConfig(count=9, kind=kind, operations=2)  # type: ignore[arg-type]
    views = {}
    for seed in (0, 1):
        augment = Augmentation(config.model_copy(update={"seed": seed}), 16)
        for key in ("a", "b"):
            for number in range(1, 10):
                views[seed, key, number] = augment.view(key, number)(Decoded.of(image)).tobytes()
    assert len(set(views.values())) > 0.9 * len(views)
    random.seed(5)
    state = random.getstate()
    again = Augmentation(config, 16)
    for number in reversed(range(1, 10)):
        pixels = again.view("b", number)(Decoded.of(image))
        assert pixels.shape == (16, 16, len(mode.replace("L", "1")) if mode == "L" else 3)
        assert pixels.tobytes() == views[0, "b", number]
    assert random.getstate() == state  # timm's draws do not change Python's generator


def test_randaugment_leaves_two_fifths_of_the_images_unchanged() -> None:
    """4 of 15 operations do nothing at magnitude 5 of 10, and each of the two is applied with probability one half."""
    y, x = np.mgrid[:16, :16]
    image = Image.fromarray(np.stack([60 + 6 * y, 70 + 5 * x, 200 - 4 * x - 4 * y], -1).astype(np.uint8))
    augment = Augmentation(AugmentationConfig(count=1, padding=0, flip=0, operations=2), 16)
    same = sum(augment.view("a", n)(Decoded.of(image)).tobytes() == np.asarray(image).tobytes() for n in range(1, 401))
    assert abs(same - 400 * (1 - 0.5 * 11 / 15) ** 2) < 33  # 3.3 standard deviations


def test_invalid_ranges_are_refused() -> None:
    for wrong in ({"area": (0.5, 0.2)}, {"area": (0, 1)}, {"area": (0.5, 1.5)}, {"ratio": (-1, 1)}):
        with pytest.raises(ValidationError, match=r"area|ratio"):
            AugmentationConfig.model_validate(wrong)


def test_an_image_is_decoded_once_for_all_its_augmentations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(3):
                picture(20, 20).save(tmp_path / split / label / f"{i}.png")
    from functa.storage.images import encoded as module

    decoded = []
    real = module.read_image
    monkeypatch.setattr(module, "read_image", lambda data, *rest: decoded.append(1) or real(data, *rest))
    images = ImagesConfig(source="folder", location=str(tmp_path), resolution=16)
    source = PlannedImages(images, AugmentationConfig(count=4), (16, 16, 3))
    rows = of_split(open_images(images).split("train"), 4)
    assert (len(rows.keys), rows.augmentations.tolist()) == (30, [0, 1, 2, 3, 4] * 6)
    batch = source.read(rows)
    assert batch.good.all()
    assert len(decoded) == 6
    assert len({image.tobytes() for image in batch.images[:5]}) > 3


def test_augmented_training_images_have_their_own_rows_and_test_images_are_not_augmented(
    field: Path, tmp_path: Path
) -> None:
    store = tmp_path / "s"
    work, _ = encode_job(
        field, store, "images.limit=60", "encode.augmentation.count=3", "encode.augmentation.padding=1",
        "encode.quantization.max_clip_fraction=0.2",
    )  # fmt: skip
    encode(work)
    functaset = Functaset.open(str(store))
    plain_work, _ = encode_job(field, tmp_path / "p", "images.limit=60", "encode.quantization.max_clip_fraction=0.2")
    encode(plain_work)
    plain = Functaset.open(str(tmp_path / "p"))
    assert functaset.rows("train") == 4 * plain.rows("train")
    assert functaset.rows("test") == plain.rows("test")
    train, without = functaset.load("train"), plain.load("train")
    assert set(zip(train.keys, train.augmentation.tolist())) == {(k, n) for k in without.keys for n in range(4)}
    as_they_are = np.flatnonzero(train.augmentation == 0)
    order = {key: row for row, key in enumerate(without.keys)}
    np.testing.assert_array_equal(
        train.dequantized(as_they_are), without.dequantized(np.array([order[train.keys[row]] for row in as_they_are]))
    )
    assert functaset.fingerprint["augmentation.count"] == 3
    before = dict(zip(zip(train.keys, train.augmentation.tolist()), map(bytes, train.codes)))  # type: ignore[arg-type]
    each = functaset.fragments[0].plan
    flip_bit(store / each.path / "z/c/1/0/0/0")
    repair(work)
    loaded = Functaset.open(str(store)).load("train")
    after = dict(zip(zip(loaded.keys, loaded.augmentation.tolist()), map(bytes, loaded.codes)))  # type: ignore[arg-type]
    assert before == after
    assert verify(open_location(str(store)), deep=True).bad == []
    key = train.keys[0]
    retire(open_location(str(store)), "train", [key])
    assert Functaset.open(str(store)).rows("train") == len(before) - 4  # all rows of the image are retired


@pytest.mark.parametrize("bits", [8, 32])
def test_the_classifier_trains_on_augmentations_and_the_diffusion_model_on_plain_images(
    field: Path, tmp_path: Path, bits: int
) -> None:
    work, _ = encode_job(
        field, tmp_path / "s", "images.limit=40", "encode.augmentation.count=2", "encode.augmentation.padding=1",
        "encode.quantization.max_clip_fraction=0.2", f"encode.quantization.bits={bits}",
    )  # fmt: skip
    encode(work)
    functaset = Functaset.open(str(tmp_path / "s"))
    stored = functaset.load("train")
    plain = stored.augmentation == 0
    z = stored.dequantized()
    cpu, how = torch.device("cpu"), NormalizationConfig(kind="array", gamma=1.0)
    of_images = training_normalizer(functaset, how, plain=True)
    np.testing.assert_allclose(of_images.mean, z[plain].astype(np.float64).mean(0), rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(of_images.scale, z[plain].astype(np.float64).std(0), rtol=1e-4)
    of_each_step = {"ranks": Ranks(device=cpu), "steps": 4, "classes": 10}
    denoised = training_batches(functaset, of_images, 40, 0, **of_each_step, plain=True)
    x, labels = denoised(0)
    assert plain.sum() == 40
    assert sorted(labels.tolist()) == sorted(stored.labels[plain].tolist())
    expected = of_images.normalize(torch.from_numpy(z[plain])).flatten(1)
    nearest = torch.cdist(x.flatten(1), expected).argmin(1)
    assert sorted(nearest.tolist()) == list(range(40))
    np.testing.assert_allclose(x.flatten(1), expected[nearest], rtol=1e-4, atol=1e-4)
    assert len(load_split(functaset, "train").z) == 40
