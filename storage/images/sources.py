"""The table of image sources: everything that depends on where images come from. Free of numpy and Pillow.

To add a source, add a line to IMAGE_SOURCES and write the function that it names.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from functa.storage.config import ImagesConfig

ImageShape = tuple[int | None, int | None, int | None]  # resolution, channels, classes; None: only the images show it

SPLIT_SETTINGS = ("test_fraction", "split_seed", "split")


def _unknown(_: "ImagesConfig") -> ImageShape:
    return None, None, None


def _encoded(config: "ImagesConfig") -> ImageShape:
    return None, config.channels or 3, None


@dataclass(frozen=True)
class ImageSource:
    """A value of images.source.

    `opens` is "module:function", from ImagesConfig to Images; it is loaded when images are opened, so that a config
    error is reported at once. `by_key` is the same, from ImagesConfig and an image's shape to the function that makes a
    split of keys, whose images are read without a listing; without it all images are opened for that. `located`:
    whether it reads images.location. `settings`: those of images that it reads and another source does not. `shape`:
    the images' shape as far as it is known without reading them.
    """

    description: str
    opens: str
    by_key: str = ""
    located: bool = True
    settings: tuple[str, ...] = ()
    shape: Callable[["ImagesConfig"], ImageShape] = _unknown

    def open(self, config: "ImagesConfig") -> Any:
        """Return the Images of this source. Raises StorageError."""
        return _imported(self.opens)(config)

    def open_keys(self, config: "ImagesConfig", shape: tuple[int, int, int]) -> Any:
        """Return the function from keys to a split of these images, of this shape. Raises StorageError."""
        return _imported(self.by_key)(config, shape)

    def check(self, name: str, config: "ImagesConfig") -> None:
        """Raise ValueError for a location that the source called `name` needs, or does not read."""
        if self.located and not config.location:
            raise ValueError(f"location is empty: images.source={name} needs images.location=PATH")
        if not self.located and config.location:
            raise ValueError(
                f"location={config.location} has no effect with images.source={name}, {self.description}: for images "
                f"of your own set images.source=folder too"
            )


def _imported(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), function)
    return found


IMAGE_SOURCES: dict[str, ImageSource] = {
    "digits": ImageSource(
        "scikit-learn's digits",
        "functa.storage.images.arrays:open_digits",
        located=False,
        settings=("test_fraction", "split_seed"),  # scikit-learn draws it
        shape=lambda _: (8, 1, 10),
    ),
    "folder": ImageSource(
        "class folders",
        "functa.storage.images.folder:open_folder",
        "functa.storage.images.folder:read_files",
        settings=(*SPLIT_SETTINGS, "labels"),
        shape=_encoded,
    ),
    "webdataset": ImageSource(
        "tars of samples",
        "functa.storage.images.tars:open_webdataset",
        "functa.storage.images.tars:read_members",
        settings=(*SPLIT_SETTINGS, "labels", "columns"),
        shape=_encoded,
    ),
    "parquet": ImageSource(
        "tables with a column of images, as Hugging Face's",
        "functa.storage.images.tables:open_parquet",
        "functa.storage.images.tables:read_cells",
        settings=(*SPLIT_SETTINGS, "labels", "columns"),
        shape=_encoded,
    ),
    "torchvision": ImageSource(
        "a torchvision data set",
        "functa.storage.images.arrays:open_torchvision",
        settings=("dataset",),
        shape=lambda config: {"CIFAR10": (32, 3, 10), "FashionMNIST": (28, 1, 10)}[config.dataset],
    ),
    "npz": ImageSource("npz arrays", "functa.storage.images.arrays:open_npz", settings=SPLIT_SETTINGS),
}


def find_source(name: str) -> ImageSource:
    """Return the source of that name. Raises ValueError, naming them all."""
    if name not in IMAGE_SOURCES:
        raise ValueError(f"expected one of {', '.join(IMAGE_SOURCES)}")
    return IMAGE_SOURCES[name]


def known_shape(config: "ImagesConfig") -> ImageShape:
    """Return (resolution, channels, classes) as far as the config alone shows them."""
    resolution, channels, classes = find_source(config.source).shape(config)
    return config.resolution or resolution, config.channels or channels, classes or config.classes
