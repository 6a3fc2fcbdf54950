"""The table of image sources: a source added to it works everywhere, and a setting without effect is refused."""

from dataclasses import replace

import numpy as np
import pytest

from functa.flows.cli.presets import describe_preset
from functa.flows.config.load import load_config
from functa.flows.config.schema import ConfigError
from functa.storage.config import ImagesConfig
from functa.storage.images.arrays import ArraySource, images_of_arrays
from functa.storage.images.source import Images, open_images
from functa.storage.images.sources import IMAGE_SOURCES, SPLIT_SETTINGS, ImageSource, known_shape

STRIPES = ["images.source=stripes", "images.channels=1"]


def open_stripes(config: ImagesConfig) -> Images:
    """Return 20 images of 8x8 pixels with one bright row or column: "Add an image source" of CONTRIBUTING.md."""
    images = np.zeros((20, 8, 8, 1), np.uint8)
    for number in range(20):
        images[number, number % 8] = 255
    images[10:] = images[10:].transpose(0, 2, 1, 3)
    labels = np.repeat(np.arange(2, dtype=np.int32), 10)
    keys = [f"stripes/{number:02d}" for number in range(20)]
    return images_of_arrays(config, {"all": ArraySource(images, labels, keys, ["row", "column"])})


@pytest.fixture
def stripes(monkeypatch: pytest.MonkeyPatch) -> ImageSource:
    source = ImageSource(
        "images of one stripe", f"{__name__}:open_stripes", located=False, settings=SPLIT_SETTINGS,
        shape=lambda _: (8, 1, 2),
    )  # fmt: skip
    monkeypatch.setitem(IMAGE_SOURCES, "stripes", source)
    return source


@pytest.mark.usefixtures("stripes")
def test_a_source_added_to_the_table_is_configured_opened_and_listed() -> None:
    config = load_config("digits", [*STRIPES, "images.test_fraction=0.2"])
    assert known_shape(config.images) == (8, 1, 2)
    images = open_images(config.images)
    assert (images.resolution, images.channels, images.classes) == (8, 1, ["row", "column"])
    assert [len(images.split(name)) for name in ("train", "test")] == [16, 4]
    batch = images.split("test").read(range(4))
    assert batch.good.all()
    assert (batch.images.sum((1, 2, 3)) == 8 * 255).all()
    assert describe_preset(config, parameters=False)["data"] == "stripes"


@pytest.mark.usefixtures("stripes")
def test_errors_about_settings_follow_from_the_table() -> None:
    with pytest.raises(ConfigError, match=r"location=x has no effect with images\.source=stripes, images of one"):
        load_config("digits", [*STRIPES, "images.location=x"])
    with pytest.raises(
        ConfigError,
        match="expected one of digits, folder, webdataset, parquet, torchvision, npz, stripes, got 'stipes'",
    ):
        load_config("digits", ["images.source=stipes"])


def test_a_source_that_needs_a_location_is_refused_without_one(
    stripes: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(IMAGE_SOURCES, "stripes", replace(stripes, located=True))
    with pytest.raises(ConfigError, match=r"images\.source=stripes needs images\.location=PATH"):
        load_config("digits", STRIPES)


def test_settings_of_another_source_are_kept() -> None:
    """Records of version 0.1.0 hold them, and so do presets whose source a user changes."""
    settings = {"source": "torchvision", "location": "x", "split_seed": 3, "test_fraction": 0.5}
    config = ImagesConfig(**settings)  # type: ignore[arg-type]
    assert (config.split_seed, config.test_fraction) == (3, 0.5)


def test_the_form_offers_every_source() -> None:
    assert ImagesConfig.model_json_schema()["properties"]["source"]["enum"] == list(IMAGE_SOURCES)
