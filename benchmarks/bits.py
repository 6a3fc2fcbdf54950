"""Measure stored bits per latent number and test PSNR of a functaset quantised anew; one JSON line (paper Fig. 11).

python benchmarks/bits.py FUNCTASET IMAGES      # a functaset of 32 bits, or its run's root; a folder of its npz images

Ranges are set by the functaset's training latents. PSNR is the mean over test images, decoded through the functaset's
own field; "range" is a name of tasks/encoding/quantizer_choice.py.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from torch import Tensor

from functa.models.field.field import Field
from functa.models.measures.metrics import psnr_of_errors
from functa.storage.config import ImagesConfig, QuantizationConfig
from functa.storage.errors import StorageError
from functa.storage.functaset.functaset import Functaset, Latents
from functa.storage.images.source import open_images
from functa.storage.places.address import open_location
from functa.storage.upkeep.requantize import requantize
from functa.tasks.encoding.quantizer_choice import CANDIDATES
from functa.tasks.inputs.pictures import as_float
from functa.tasks.trained import field_of

CODECS = ("zstd", "exact")
DECODED = 128  # images at a time


def measure(uri: str, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the row: PSNR of float32 latents and of every bits x granularity x range, bits per number by codec."""
    source = Functaset.open(_functaset(uri))
    field, _, side = field_of(source)
    latents = source.load("test")
    keys = sorted(latents.keys)[: options.images]
    pixels = _pixels(folder, keys)
    row: dict[str, Any] = {"name": "bits", "latent": list(source.latent_shape), "rows": source.info()["rows"]}
    row |= {"test_images": len(keys), "psnr": _psnr(field, side, latents, keys, pixels)}
    row["codes"] = [
        _coded(source, bits, granularity, name, lambda coded: _psnr(field, side, coded, keys, pixels))
        for granularity in options.granularities
        for name in options.ranges
        for bits in options.bits
    ]
    return row


def _functaset(uri: str) -> str:
    return f"{uri}/functaset.zarr" if Path(uri, "functaset.zarr").is_dir() else uri


def _pixels(folder: str, keys: list[str]) -> Tensor:
    """Read the images of the keys, float32 [n, H, W, ch]."""
    split = open_images(ImagesConfig(source="npz", location=folder)).split("test")
    places = {key: row for row, key in enumerate(split.keys)}
    missing = [key for key in keys if key not in places]
    if missing:
        raise StorageError(f"{folder}: holds no image of {len(missing)} test rows; name the images that were encoded")
    return as_float(split.read([places[key] for key in keys]).images)


def _psnr(field: Field, side: int, latents: Latents, keys: list[str], pixels: Tensor) -> float:
    places = {key: row for row, key in enumerate(latents.keys)}
    z = torch.from_numpy(latents.dequantized())[[places[key] for key in keys]]
    with torch.no_grad():
        errors = [
            (field(part, (side, side)) - images).square().mean((1, 2, 3))
            for part, images in zip(z.split(DECODED), pixels.split(DECODED), strict=True)
        ]
    return round(psnr_of_errors(torch.cat(errors)).mean().item(), 3)


def _coded(source: Functaset, bits: int, granularity: str, name: str, psnr: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"bits": bits, "granularity": granularity, "range": name, "bits_per_dim": {}}
    for codec in CODECS:
        chosen = {"bits": bits, "granularity": granularity, "codec": codec, "max_clip_fraction": 1.0}
        with tempfile.TemporaryDirectory() as folder:
            requantize(
                source, open_location(folder), QuantizationConfig.model_validate(chosen | dict(CANDIDATES[name]))
            )
            made = Functaset.open(folder)
            info = made.info()
            row["bits_per_dim"][codec] = round(info["bits_per_dim"], 4)
            if codec == CODECS[0]:  # the other holds the same codes
                row |= {"psnr": psnr(made.load("test")), "clip_fraction": round(info["clip_fraction"], 6)}
    return row


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("functaset")
    parser.add_argument("folder")
    parser.add_argument("--images", type=int, default=1000, help="test images decoded")
    parser.add_argument("--bits", type=_list_of(int), default=[8, 7, 6, 5, 4])
    parser.add_argument("--ranges", type=_list_of(str), default=list(CANDIDATES))
    parser.add_argument("--granularities", type=_list_of(str), default=["element", "channel", "scalar"])
    return parser.parse_args()


def _list_of(kind: Any) -> Any:
    return lambda text: [kind(part) for part in text.split(",")]


if __name__ == "__main__":
    chosen = _options()
    try:
        print(json.dumps(measure(chosen.functaset, chosen.folder, chosen)))
    except StorageError as error:
        raise SystemExit(f"bits.py: {error}") from None
