"""Kodak photographs at 256x256: a field trained on half of them, measured on the other half beside PCA.

    python benchmarks/kodak.py crops FOLDER OUT      # 16 PNG files -> OUT/train.npz, OUT/test.npz
    functa meta-train kodak_16x16x64 --set images.location=OUT --root ROOT
    python benchmarks/kodak.py measure ROOT OUT      # one JSON line

Every other image by name is for training, cut every 64 pixels; the others are cut without overlap (768x512: 6 crops).
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.inner import InnerLoop
from models.metrics import pca_psnr, pooled_psnr, psnr_of_errors
from tasks.training.meta_train import load_field

SIDE, STRIDE = 256, 64


def crops(image: np.ndarray, stride: int) -> list[np.ndarray]:
    """[H, W, 3] -> its crops [256, 256, 3] at multiples of the stride."""
    height, width = image.shape[:2]
    corners = [(y, x) for y in range(0, height - SIDE + 1, stride) for x in range(0, width - SIDE + 1, stride)]
    return [image[y : y + SIDE, x : x + SIDE] for y, x in corners]


def write_crops(folder: Path, out: Path) -> str:
    """Writes both archives; one line on what they hold."""
    paths = sorted(folder.glob("*.png"))
    if len(paths) < 2:
        raise SystemExit(f"{folder}: holds {len(paths)} PNG files; name the folder of the Kodak images")
    out.mkdir(parents=True, exist_ok=True)
    counts = {}
    for split, chosen, stride in (("train", paths[::2], STRIDE), ("test", paths[1::2], SIDE)):
        images = np.stack([c for p in chosen for c in crops(np.asarray(Image.open(p).convert("RGB")), stride)])
        np.savez(out / f"{split}.npz", images=images, labels=np.zeros(len(images), np.int64))
        counts[split] = len(images)
    return f"{out}: {counts['train']} training and {counts['test']} test crops of {SIDE}x{SIDE}"


def measure(root: Path, data: Path) -> dict[str, object]:
    """PSNR of the root's field on the test crops, beside PCA with as many numbers per patch."""
    field, inner, metadata = load_field(str(root / "checkpoints" / "field"))
    loop = InnerLoop(field, inner, (SIDE, SIDE)).prepared(100)
    train, test = (_pixels(data / f"{split}.npz") for split in ("train", "test"))
    errors = torch.cat([loop.errors(image[None]) for image in test])
    config = field.config
    patch, patch_pooled = pca_psnr(train, test, config.channels, SIDE // config.spatial)
    return {
        "name": "kodak", "latent": list(config.latent_shape), "training_crops": metadata["images"],
        "test_crops": len(test), "psnr": round(psnr_of_errors(errors).mean().item(), 2),
        "psnr_pooled": round(pooled_psnr(errors), 2), "psnr_pca_patch": round(patch, 2),
        "psnr_pca_patch_pooled": round(patch_pooled, 2),
    }  # fmt: skip


def _pixels(path: Path) -> Tensor:
    with np.load(path, allow_pickle=False) as data:
        return torch.from_numpy(data["images"]).float() / 255


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in ("crops", "measure"):
        raise SystemExit(__doc__)
    if sys.argv[1] == "crops":
        print(write_crops(Path(sys.argv[2]), Path(sys.argv[3])))
    else:
        print(json.dumps(measure(Path(sys.argv[2]), Path(sys.argv[3]))))
