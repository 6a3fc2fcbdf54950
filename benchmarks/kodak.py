"""Cut Kodak photographs into 256x256 crops, so that a field trained on half of them can be measured on the other half.

The photographs are lossless scans: they have no 8x8 blocks of JPEG, which a field would learn and a PSNR would reward.

    python benchmarks/kodak.py FOLDER OUT            # 16 PNG files -> OUT/train.npz, OUT/test.npz
    functa meta-train kodak_16x16x64 --set images.location=OUT --root ROOT
    python benchmarks/psnr.py ROOT OUT               # one JSON line

Every other image by name is for training, cut every 64 pixels; the others are cut without overlap (768x512: 6 crops).
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

SIDE, STRIDE = 256, 64


def crops(image: np.ndarray, stride: int) -> list[np.ndarray]:
    """Return the crops [256, 256, 3] of an image [H, W, 3] at multiples of the stride."""
    height, width = image.shape[:2]
    corners = [(y, x) for y in range(0, height - SIDE + 1, stride) for x in range(0, width - SIDE + 1, stride)]
    return [image[y : y + SIDE, x : x + SIDE] for y, x in corners]


def write_crops(folder: Path, out: Path) -> str:
    """Write both archives; return one line that describes them."""
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


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    print(write_crops(Path(sys.argv[1]), Path(sys.argv[2])))
