"""Cut photographs into the crops that ready-made fields are trained on, measure such a field, and pack it.

    python benchmarks/photographs.py crops KODAK OUT         # 16 PNG files -> OUT/train.npz, OUT/test.npz
    functa meta-train photo_p8c32 --set images.location=OUT --root ROOT
    python benchmarks/photographs.py measure ROOT KODAK OUT  # one JSON line; ROOT may be the name of a shipped field
    python benchmarks/photographs.py pack ROOT photo_p8c32 models/ready --card CARD.json

Every other Kodak image by name is trained on, and three photographs of free licences in scikit-image; the others are
held out. All are lossless: JPEG's own blocks of 8x8 pixels would be learned, and rewarded. Crops are anywhere in a
photograph, turned and mirrored at random, so that a patch may begin at any pixel.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np
import torch
from PIL import Image

from functa.models.measures.metrics import pca_psnr
from functa.storage.errors import FunctaError
from functa.storage.images.arrays import read_npz
from functa.tasks.inference.open_models import load_ready_field
from functa.tasks.inference.photographs.encode import encode_folder
from functa.tasks.inference.ready.pack import pack

SIDE, CROPS = 128, 2048
INSIDE_SCIKIT_IMAGE = ("astronaut.png", "chelsea.png", "coffee.png")


def write_crops(kodak: Path, out: Path) -> str:
    """Write both archives; return one line that describes them."""
    train, test = split_of(kodak)
    pixels = np.array([image.shape[0] * image.shape[1] for image in train])
    generator = np.random.default_rng(0)
    chosen = generator.choice(len(train), CROPS, p=pixels / pixels.sum())
    arrays = {"train": [_crop(train[number], generator) for number in chosen], "test": _tiles(test)}
    out.mkdir(parents=True, exist_ok=True)
    for split, crops in arrays.items():
        np.savez(out / f"{split}.npz", images=np.stack(crops), labels=np.zeros(len(crops), np.int64))
    counts = {split: len(crops) for split, crops in arrays.items()}
    return f"{out}: {counts['train']} training crops of {len(train)} photographs, {counts['test']} of {len(test)}"


def split_of(kodak: Path) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the photographs to train on and those held out, uint8 [H, W, 3] each."""
    import skimage

    paths = sorted(kodak.glob("*.png"))
    if len(paths) < 2:
        raise SystemExit(f"{kodak}: holds {len(paths)} PNG files; name the folder of the Kodak images")
    others = [Path(skimage.__file__).parent / "data" / name for name in INSIDE_SCIKIT_IMAGE]
    return [_read(path) for path in [*paths[::2], *others]], [_read(path) for path in paths[1::2]]


def _read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def _crop(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    top, left = (generator.integers(side - SIDE + 1) for side in image.shape[:2])
    crop = np.rot90(image[top : top + SIDE, left : left + SIDE], generator.integers(4))
    return crop[:, ::-1] if generator.integers(2) else crop


def _tiles(images: list[np.ndarray]) -> list[np.ndarray]:
    corners = [(image, y, x) for image in images for y in range(0, image.shape[0] - SIDE + 1, SIDE)
               for x in range(0, image.shape[1] - SIDE + 1, SIDE)]  # fmt: skip
    return [image[y : y + SIDE, x : x + SIDE] for image, y, x in corners]


def measure(field: str, kodak: Path, crops: Path, bits: int, steps: int | None) -> dict[str, Any]:
    """Return PSNR, bits a pixel and seconds of held-out photographs and of all, at full size, beside patch PCA."""
    ready = load_ready_field(field)
    paths = sorted(kodak.glob("*.png"))
    row: dict[str, Any] = {"name": "photographs", "field": field, "patch": ready.patch, "channels": ready.channels}
    row |= {"bits": bits, "steps": steps or ready.inner.steps, "threads": torch.get_num_threads()}
    training = torch.from_numpy(read_npz(str(crops))["train"].images).float() / 255
    for name, some in (("held_out", paths[1::2]), ("all", paths)):
        with tempfile.TemporaryDirectory() as folder:
            images = Path(folder, "images")
            images.mkdir()
            for path in some:
                (images / path.name).symlink_to(path.resolve())
            begun, used = time.monotonic(), _cpu()
            done = encode_folder(ready, str(images), str(Path(folder, "store")), bits=bits, steps=steps)
            seconds, cpu = time.monotonic() - begun, _cpu() - used
        row[name] = {
            "images": len(done.psnr), "psnr": round(float(np.mean(done.psnr)), 3),
            "psnr_stored": round(float(np.mean(done.psnr_stored)), 3), "bits_per_pixel": round(done.bits_per_pixel, 4),
            "psnr_pca": round(_pca(training, some, ready.channels, ready.patch), 3),
            "seconds_per_image": round(seconds / len(some), 3), "cpu_seconds_per_image": round(cpu / len(some), 3),
        }  # fmt: skip
    return row


def _pca(training: torch.Tensor, paths: list[Path], numbers: int, patch: int) -> float:
    each = [torch.from_numpy(_read(path))[None].float() / 255 for path in paths]
    shapes = {image.shape for image in each}
    groups = [torch.cat([image for image in each if image.shape == shape]) for shape in shapes]
    return sum(len(group) * pca_psnr(training, group, numbers, patch)[0] for group in groups) / len(each)


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    cutting = commands.add_parser("crops")
    cutting.add_argument("kodak", type=Path)
    cutting.add_argument("out", type=Path)
    measuring = commands.add_parser("measure")
    measuring.add_argument("field")
    measuring.add_argument("kodak", type=Path)
    measuring.add_argument("crops", type=Path)
    measuring.add_argument("--bits", type=int, default=8)
    measuring.add_argument("--steps", type=int)
    packing = commands.add_parser("pack")
    packing.add_argument("root")
    packing.add_argument("field")
    packing.add_argument("out")
    packing.add_argument("--card", type=Path, required=True, help="JSON of data, command, limits, licence, figures")
    return parser.parse_args()


def _answer(options: argparse.Namespace) -> str:
    if options.command == "crops":
        return write_crops(options.kodak, options.out)
    if options.command == "measure":
        return json.dumps(measure(options.field, options.kodak, options.crops, options.bits, options.steps))
    record = pack(options.root, options.field, options.out, json.loads(options.card.read_text()))
    return json.dumps({"name": record.name, "bytes": record.bytes, "figures": record.card.figures})


if __name__ == "__main__":
    try:
        print(_answer(_options()))
    except FunctaError as error:
        raise SystemExit(f"photographs.py: {error}") from None
