"""Small ready-made fields and photographs for tests."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from functa.models.config import FieldConfig, InnerConfig
from functa.models.field.field import Field
from functa.storage.places.address import open_location
from functa.tasks.inference.ready.shipped import ReadyRecord, write_pair

CARD = {
    "data": "noise",
    "training": "none",
    "command": "none",
    "limits": "all",
    "licence": "none",
    "figures": {"dB": 1.5},
}


def write_ready(folder: Path, name: str = "tiny", patch: int = 4, image_channels: int = 3, **field: Any) -> ReadyRecord:
    """Write the pair of files of an untrained field into a folder."""
    torch.manual_seed(0)
    config = FieldConfig(**({"spatial": 1, "channels": 8, "width": 16, "depth": 3} | field))
    inner = InnerConfig(rates_init=(0.5, 0.5), compile="off")
    module = Field(config, inner, image_channels, seed=3)
    tensors = {key: value.numpy() for key, value in module.state_dict().items()}
    described = {
        "name": name, "field": config.model_dump(mode="json"), "inner": inner.model_dump(mode="json"),
        "image_channels": image_channels, "patch": patch, "card": CARD,
    }  # fmt: skip
    return write_pair(open_location(str(folder)), tensors, described)


def write_photograph(path: Path, height: int, width: int, seed: int = 0, grey: bool = False) -> np.ndarray:
    """Write a smooth image as a PNG file; return its pixels uint8 [H, W, 3] or, of a grey one, [H, W]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    phase = np.random.default_rng(seed).random((3, 3)) * 6
    y, x = np.mgrid[0:height, 0:width] / 9
    waves = np.stack([np.sin(a + x) + np.sin(b + y) + np.sin(c + x + y) for a, b, c in phase], -1)
    pixels = ((waves + 3) * 42).astype(np.uint8)
    pixels = pixels[..., 0] if grey else pixels
    Image.fromarray(pixels).save(path)
    return pixels
