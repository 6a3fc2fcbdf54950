"""Image files made in memory, for tests."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(seed: int, side: int = 8, channels: int = 3) -> np.ndarray:
    """Return random pixels, uint8 [side, side, 3] or [side, side]."""
    shape = (side, side, 3) if channels == 3 else (side, side)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def class_folders(folder: Path, per_class: int = 6, classes: tuple[str, ...] = ("cat", "dog"), side: int = 8) -> Path:
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            (folder / name / f"{i:03d}.png").write_bytes(encoded(Image.fromarray(noise(100 * label + i, side))))
    return folder
