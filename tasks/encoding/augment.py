"""Augment training images: crops and flips for CIFAR-10, random boxes and RandAugment for ImageNet (App. B.1, C).

An augmentation depends on (seed, image, number) alone, in any process and any order.
"""

import hashlib
import random
import threading
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from functa.storage.images.files import Decoded
from functa.tasks.config import AugmentationConfig

GREY = (128, 128, 128)  # fills corners that a rotation or a shear leaves empty

TRIES = 10  # boxes drawn before falling back to the largest centred one

_drawing = threading.Lock()  # timm draws from Python's own generator


class Augmentation:
    """Makes augmented versions of images, uint8 [resolution, resolution, C]."""

    def __init__(self, config: AugmentationConfig, resolution: int) -> None:
        self.config, self.resolution = config, resolution

    def view(self, key: str, number: int) -> Callable[[Decoded], np.ndarray]:
        """Return the function from an image to this augmentation; number 0 is the plain image."""
        if number == 0:
            return lambda image: image.square(self.resolution)
        seed = np.frombuffer(hashlib.sha256(f"{self.config.seed}\0{key}\0{number}".encode()).digest(), np.uint8)
        return lambda image: self._augmented(image, np.random.default_rng(seed.astype(np.uint32)))

    def _augmented(self, image: Decoded, draw: np.random.Generator) -> np.ndarray:
        pixels = self._cropped(image, draw) if self.config.kind == "crop" else self._distorted(image, draw)
        if draw.random() < self.config.flip:
            pixels = pixels[:, ::-1]
        return self._randomly(pixels, draw) if self.config.operations else np.ascontiguousarray(pixels)

    def _cropped(self, image: Decoded, draw: np.random.Generator) -> np.ndarray:
        pixels, side = image.square(self.resolution), self.resolution
        down, right = (draw.integers(2 * self.config.padding + 1, size=2) - self.config.padding).tolist()
        cropped = np.zeros_like(pixels)  # black where the window leaves the image
        cropped[_covered(-down, side), _covered(-right, side)] = pixels[_covered(down, side), _covered(right, side)]
        return cropped

    def _distorted(self, image: Decoded, draw: np.random.Generator) -> np.ndarray:
        left, top, width, height = _box(image.size, self.config, draw)
        return image.square(self.resolution, (left, top, left + width, top + height))

    def _randomly(self, pixels: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        """Apply RandAugment (Cubuk et al. 2020) with timm's operations, each with its probability of one half."""
        from PIL import Image

        channels = pixels.shape[-1]
        image = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if channels == 1 else pixels)).convert("RGB")
        for operation in draw.choice(np.array(self._operations, object), self.config.operations):
            if draw.random() >= operation.prob:
                continue
            with _drawing:
                state = random.getstate()
                random.seed(int(draw.integers(2**63)))
                arguments = operation.level_fn(operation.magnitude, operation.hparams) if operation.level_fn else ()
                random.setstate(state)
            image = operation.aug_fn(image, *arguments, **operation.kwargs)
        found = np.asarray(image.convert("L" if channels == 1 else "RGB"))
        return found[..., None] if channels == 1 else found

    @cached_property
    def _operations(self) -> list[Any]:
        from PIL import Image
        from timm.data.auto_augment import rand_augment_ops

        hparams = {"translate_pct": 0.45, "img_mean": GREY, "interpolation": Image.Resampling.BICUBIC}
        return list(rand_augment_ops(magnitude=self.config.magnitude, hparams=hparams))


def _covered(offset: int, side: int) -> slice:
    """Return the pixels of an image, along one side, that a window of its size covers at this offset."""
    return slice(max(0, offset), max(0, side + min(0, offset)))


def _box(
    size: tuple[int, int], config: AugmentationConfig, draw: np.random.Generator
) -> tuple[float, float, float, float]:
    """Draw a box (left, top, width, height) of random area and shape inside the image (Szegedy et al. 2016)."""
    whole_width, whole_height = size
    for _ in range(TRIES):
        area = draw.uniform(*config.area) * whole_width * whole_height
        ratio = np.exp(draw.uniform(*np.log(config.ratio)))
        width, height = np.sqrt(area * ratio), np.sqrt(area / ratio)
        if width <= whole_width and height <= whole_height:
            return draw.uniform(0, whole_width - width), draw.uniform(0, whole_height - height), width, height
    ratio = np.clip(whole_width / whole_height, *config.ratio)
    width, height = min(whole_width, whole_height * ratio), min(whole_height, whole_width / ratio)
    return (whole_width - width) / 2, (whole_height - height) / 2, width, height
