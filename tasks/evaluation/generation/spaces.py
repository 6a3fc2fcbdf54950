"""The table of feature spaces in which samples are compared with images. Free of torch.

To add one: a file with a function that opens its extractor, and an entry here. Config, metrics.json, report, gate,
sweeps and the reference page read this table.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from functa.storage.errors import StorageError
from functa.tasks.evaluation.generation.efficientnet import missing_package

if TYPE_CHECKING:
    from functa.tasks.evaluation.generation.extractor import Extractor, Setting

SMALLEST = 16  # pixels: the network was trained on photographs of 224


@dataclass(frozen=True)
class FeatureSpace:
    """One entry: its words, how it is opened, and what keeps it from being measured."""

    words: str
    opener: str
    """`module:function` from a Setting to an Extractor, imported when it is called."""
    obstacle: Callable[[int, int], str] = lambda side, classes: ""
    """From the images' side and number of classes: why it cannot be measured, or ""."""
    optional: bool = True
    """Whether evaluation.generation.spaces chooses it; Inception's features follow evaluation.fid."""

    def open(self, setting: "Setting") -> "Extractor":
        """Open what computes the features."""
        module, _, name = self.opener.partition(":")
        opened: Extractor = getattr(import_module(module), name)(setting)
        return opened


def _too_few_classes(side: int, classes: int) -> str:
    return "" if classes > 1 else f"a classifier learns from two classes or more, and the images have {classes}"


def _odd(side: int, classes: int) -> str:
    return f"wavelet packets halve the images, and a side of {side} pixels is odd" if side % 2 else ""


def _not_for_the_network(side: int, classes: int) -> str:
    if side < SMALLEST:
        return f"its network takes images of {SMALLEST}x{SMALLEST} pixels or more, not {side}x{side}"
    return missing_package()


_HERE = "functa.tasks.evaluation.generation"

SPACES: dict[str, FeatureSpace] = {
    "classifier": FeatureSpace("pixel-classifier features", f"{_HERE}.extractor:open_classifier", _too_few_classes),
    "latent": FeatureSpace("latents", f"{_HERE}.extractor:open_latent"),
    "wavelet": FeatureSpace("wavelet packets", f"{_HERE}.extractor:open_wavelet", _odd),
    "efficientnet_lite0": FeatureSpace(
        "EfficientNet-Lite0 features", f"{_HERE}.efficientnet:open_extractor", _not_for_the_network
    ),
    "inception": FeatureSpace("Inception features", f"{_HERE}.inception:open_extractor", optional=False),
    "inception_other": FeatureSpace(
        "features of other Inception weights", f"{_HERE}.inception:open_extractor", optional=False
    ),
}


def obstacles(side: int, classes: int) -> dict[str, str]:
    """Return the spaces in which images of `side` pixels cannot be measured here, with the reasons."""
    found = {name: space.obstacle(side, classes) for name, space in SPACES.items() if space.optional}
    return {name: reason for name, reason in found.items() if reason}


def chosen_spaces(asked: Sequence[str] | None, side: int, classes: int) -> tuple[str, ...]:
    """Return the spaces to measure images of `side` pixels in: those asked for; None: all that can be measured.

    Raises StorageError where one that is asked for cannot be measured.
    """
    impossible = obstacles(side, classes)
    if asked is None:
        return tuple(name for name, space in SPACES.items() if space.optional and name not in impossible)
    for name in asked:
        if name in impossible:
            raise StorageError(
                f"evaluation.generation.spaces: {name} is not possible: {impossible[name]}; or leave it out"
            )
    return tuple(name for name in SPACES if name in asked)
