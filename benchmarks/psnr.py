"""Measure a trained field's PSNR on a whole test split, beside linear baselines of the same size; one JSON line.

python benchmarks/psnr.py ROOT FOLDER            # ROOT of `functa meta-train`, FOLDER of train.npz and test.npz
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np
import torch
from torch import Tensor

from functa.models.compute.compilation import should_compile
from functa.models.field.cost import encode_passes, forward_flops
from functa.models.field.inner import InnerLoop
from functa.models.measures.metrics import pca_psnr, pooled_psnr, psnr_of_errors
from functa.storage.errors import StorageError
from functa.storage.images.arrays import read_npz
from functa.tasks.trained import load_field

PCA_IMAGES = 20_000  # more changes the baseline by hundredths of a dB
PCA_VALUES = 4096  # of one row: a covariance of more is not fitted
PIXELS = 1 << 16  # per call


def measure(root: Path, folder: Path) -> dict[str, Any]:
    """Return PSNR (mean of images, and pooled) of the field's float32 latents, and of PCA with as many numbers."""
    field, inner, metadata = load_field(str(root / "checkpoints" / "field"))
    side = metadata["resolution"]
    arrays = read_npz(str(folder))
    train, test = _pixels(arrays["train"].images[:PCA_IMAGES]), _pixels(arrays["test"].images)
    work = encode_passes(inner) * forward_flops(field.config, (side, side), field.image_channels) * float(len(test))
    compiled, _ = should_compile("auto", work, torch.device("cpu"))
    loop = InnerLoop(field, inner, (side, side), compiled).prepared(len(test))
    size = max(1, PIXELS // side**2)
    filled = torch.cat([test, test[: -len(test) % size]])  # equal parts: one compiled graph
    errors = torch.cat([loop.errors(part) for part in filled.split(size)])[: len(test)]
    config = field.config
    row = {
        "name": "psnr", "latent": list(config.latent_shape), "test_images": len(test),
        "psnr": psnr_of_errors(errors).mean().item(), "psnr_pooled": pooled_psnr(errors),
        "training_seconds": metadata["seconds"], "training_images": metadata["images"],
    }  # fmt: skip
    patch = side // config.spatial
    baselines = {
        "pca_patch": (config.channels, patch, patch**2, len(train) * config.positions),
        "pca_image": (config.numbers, None, side**2, len(train)),
    }
    for name, (numbers, shape, pixels, samples) in baselines.items():
        if numbers < min(pixels * field.image_channels, samples) and pixels * field.image_channels <= PCA_VALUES:
            row[f"psnr_{name}"], row[f"psnr_{name}_pooled"] = pca_psnr(train, test, numbers, shape)
    return {key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()}


def _pixels(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).float() / 255


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    try:
        print(json.dumps(measure(Path(sys.argv[1]), Path(sys.argv[2]))))
    except StorageError as error:
        raise SystemExit(f"psnr.py: {error}") from None
