"""Time what feeds a device and takes its results, each step beside the plain way, in turns; prints one JSON line.

    python benchmarks/feed.py                                  # about 2 minutes of one core
    python benchmarks/feed.py --photographs FOLDER             # of your own, at least 512x384, instead of two

Images or rows of latents a second of one core (processor time). Plain: decoded whole and resized by Pillow, crops by
padding, float32 made on the host, codes in double precision. `cores`: those that one device needs at so many images/s.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np
import torch
from PIL import Image

from functa.storage.config import QuantizationConfig
from functa.storage.functaset.header import create_functaset
from functa.storage.functaset.plan import RowTable
from functa.storage.functaset.planning import plan_fragment
from functa.storage.functaset.quantizer import Quantizer, calibrate
from functa.storage.functaset.shards.writing import write_shard
from functa.storage.images.files import Decoded, read_image
from functa.storage.images.source import LEAST_THREADS
from functa.storage.places.address import open_location
from functa.storage.places.location import Location
from functa.tasks.config import AugmentationConfig
from functa.tasks.encoding.augment import Augmentation
from functa.tasks.inputs.pictures import as_float

SIZES = [((256, 256), 256), ((500, 375), 256), ((500, 375), 32), ((2000, 1500), 256), ((1024, 768), 64), ((32, 32), 32)]
SPEEDS = {32: 43_000, 256: 600}  # images/s that one H100 encodes: measured, and assumed
Call = Callable[[], Any]


def rates(calls: dict[str, Call], each: int, seconds: float) -> dict[str, float]:
    """Return how many of `each` things a call does a second of processor time, the best of five turns."""
    best = dict.fromkeys(calls, 0.0)
    for _ in range(5):
        for name, call in calls.items():
            begun, done = time.process_time(), 0
            while time.process_time() - begun < seconds / 5:
                call()
                done += each
            best[name] = max(best[name], done / (time.process_time() - begun))
    return {name: float(f"{rate:.3g}") for name, rate in best.items()}


def photographs(folder: str | None, size: tuple[int, int], kind: str) -> list[bytes]:
    """Return 16 files of this size, JPEGs of quality 90 or PNGs, each of a window of 512x384 pixels or the like."""
    if folder:
        found = [Image.open(path).convert("RGB") for path in sorted(Path(folder).iterdir())]
    else:
        from sklearn.datasets import load_sample_images

        found = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    files, across = [], round(384 * size[0] / size[1])
    for number in range(16):
        image, buffer = found[number % len(found)], io.BytesIO()
        left, top = (image.width - across) * (number % 3) // 2, (image.height - 384) * (number // 3 % 3) // 2
        part = image.crop((left, top, left + across, top + 384)).resize(size, Image.Resampling.LANCZOS)
        part.save(buffer, kind, **({"quality": 90} if kind == "JPEG" else {}))
        files.append(buffer.getvalue())
    return files


def squares(files: list[bytes], side: int, decoder: Any) -> list[np.ndarray]:
    return [read_image(data, 3, 10**8, decoder).square(side) for data in files]


def decibels(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, np.square(one.astype(float) - other).mean())))


def decoding(folder: str | None, seconds: float) -> dict[str, Any]:
    """Time decoding and fitting; the fast pixels beside the exact ones, in dB."""
    found: dict[str, Any] = {}
    for size, side in SIZES:
        kind = "PNG" if side == size[0] == 32 else "JPEG"
        files = photographs(folder, size, kind)
        calls = {name: partial(squares, files, side, name) for name in ("exact", "fast")}
        agreement = [decibels(*pair) for pair in zip(calls["exact"](), calls["fast"]())]
        rate = rates(calls, len(files), seconds)
        found[f"{kind} {size[0]}x{size[1]} -> {side}"] = rate | {"db": round(float(np.mean(agreement)), 1)}
    return found


def padded(pixels: np.ndarray, draw: np.random.Generator) -> None:
    """Cut ten crops of an image as most do."""
    for _ in range(10):
        larger = np.pad(np.asarray(Image.fromarray(pixels)), ((4, 4), (4, 4), (0, 0)))
        top, left = draw.integers(9, size=2)
        np.ascontiguousarray(larger[top : top + 32, left : left + 32])


def views(augmentation: Augmentation, opened: Callable[[], Decoded]) -> None:
    """Make ten augmentations of an image."""
    image = opened()
    for number in range(1, 11):
        augmentation.view("a", number)(image)


def cropping(folder: str | None, seconds: float) -> dict[str, Any]:
    """Time ten crops of an image in memory, and ten random boxes of a file, which is decoded for them."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    crop, box = AugmentationConfig(count=10, kind="crop"), AugmentationConfig(count=10, kind="distort")
    calls: dict[str, Call] = {
        "plain": partial(padded, pixels, np.random.default_rng(1)),
        "here": partial(views, Augmentation(crop, 32), lambda: Decoded.of(Image.fromarray(pixels))),
    }
    found: dict[str, Any] = {"32x32 in memory": rates(calls, 10, seconds)}
    for size in ((500, 375), (2000, 1500)):
        data = photographs(folder, size, "JPEG")[0]
        found[f"boxes of {size[0]}x{size[1]} -> 256"] = rates(
            {name: partial(views, Augmentation(box, 256), partial(read_image, data, 3, 10**8, name))  # type: ignore[arg-type]
             for name in ("exact", "fast")}, 10, seconds,
        )  # fmt: skip
    return found


def plainly(quantizer: Quantizer, z: np.ndarray) -> None:
    """Quantise in double precision."""
    position = (z.astype(np.float64) - quantizer.low) / quantizer.step
    np.clip(np.floor(position), 0, 255).astype(np.uint8)
    np.count_nonzero((position < 0) | (position > 256))


def storing(seconds: float) -> dict[str, Any]:
    """Time the host's part of copying a batch, quantising, and writing whole shards."""
    found: dict[str, Any] = {}
    for side in SPEEDS:
        images = np.zeros((64, side, side, 3), np.uint8)
        calls: dict[str, Call] = {"plain": partial(as_float, images), "here": torch.from_numpy(images).clone}
        found[f"copy {side}x{side}"] = rates(calls, 64, seconds)
    for shape in ((8, 8, 16), (16, 16, 128), (32, 32, 64)):
        name = "x".join(map(str, shape))
        z = np.random.default_rng(0).normal(0, 0.05, (max(64, 2**21 // int(np.prod(shape))), *shape)).astype(np.float32)
        quantizer = calibrate(QuantizationConfig(bits=8), z)
        assert quantizer is not None
        calls = {"plain": partial(plainly, quantizer, z), "here": partial(quantizer.encode, z)}
        found[f"quantise {name}"] = rates(calls, len(z), seconds)
        for bits in (32, 8):
            rate = writing(z, quantizer if bits == 8 else None)
            found[f"write {name}, {bits} bits"] = {"here": float(f"{rate:.3g}")}
    return found


def writing(z: np.ndarray, quantizer: Quantizer | None) -> float:
    """Return the rows a second that one shard is written with, the best of three."""
    best = 0.0
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            location = open_location(folder)
            create_functaset(location, {}, {"w": np.zeros(1, np.float32)}, {}, "f0")
            keys = [str(row) for row in range(len(z))]
            fragment = plan_fragment(
                location, RowTable.of(keys, np.zeros(len(z), np.int32), keys), split="train", latent_shape=z.shape[1:],
                shard_rows=len(z), chunk_rows=64, quantizer=quantizer,
            )  # fmt: skip
            begun = time.process_time()
            write_shard(
                fragment.shards[0], latents=z, psnr=np.full(len(z), 36, np.float32),
                sha256=np.zeros((len(z), 32), np.uint8), max_clip_fraction=1.0,
            )  # fmt: skip
            best = max(best, len(z) / (time.process_time() - begun))
    return best


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Run moto's S3 server in a process of its own, whose time does not count; yield the environment of its clients."""
    code = "import json, sys; from tests.helpers.storage.s3_servers import moto_server\nwith moto_server() as found:\n"
    code += "    print(json.dumps(found), flush=True)\n    sys.stdin.read()"
    command = [sys.executable, "-c", code]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=Path(__file__).parents[1], text=True, **pipes) as server:
        try:
            yield json.loads(server.stdout.readline())  # type: ignore[union-attr]
        finally:
            server.terminate()


def from_bucket(folder: str | None, seconds: float) -> dict[str, Any]:
    """Time reading and decoding objects, and listing them; plain: by s3fs, asked for the version first."""
    import fsspec

    found: dict[str, Any] = {}
    with s3_server() as environment, ThreadPoolExecutor(LEAST_THREADS) as pool:
        os.environ |= environment
        system = fsspec.filesystem("s3", use_listings_cache=False)
        system.call_s3("create_bucket", Bucket="feed")
        for size, side, kind in (((32, 32), 32, "PNG"), ((256, 256), 256, "JPEG")):
            place = open_location(f"s3://feed/{kind}")
            files = {f"{number:02d}": data for number, data in enumerate(photographs(folder, size, kind))}
            for key, data in files.items():
                place.write(key, data)
            calls: dict[str, Call] = {
                "plain": partial(pictures, pool, partial(by_s3fs, system, kind), side, list(files)),
                "here": partial(pictures, pool, partial(in_one, place), side, list(files)),
            }
            found[f"S3 {kind} {size[0]}x{size[1]} -> {side}"] = rates(calls, len(files), seconds)
        place = open_location("s3://feed/many")
        for number in range(1000):
            place.write(f"{number:04d}", b"")
        calls = {"plain": lambda: system.find("feed/many", detail=True), "here": place.listing}
        found["S3 listing"] = rates(calls, 1000, seconds)
    return found


def pictures(pool: ThreadPoolExecutor, read: Callable[[str], bytes], side: int, keys: list[str]) -> list[Any]:
    """Read and decode in threads, as an encoding does."""
    return list(pool.map(lambda key: squares([read(key)], side, "fast"), keys))


def in_one(place: Location, key: str) -> bytes:
    return place.versioned(key)[1]  # type: ignore[index]


def by_s3fs(system: Any, kind: str, key: str) -> bytes:
    system.call_s3("head_object", Bucket="feed", Key=f"{kind}/{key}")
    return bytes(system.cat_file(f"feed/{kind}/{key}", max_concurrency=1))


def cores(found: dict[str, Any], reading: Sequence[tuple[str, str]], stored: str, side: int) -> dict[str, float]:
    """Return the cores that one device needs: for images read in each of several ways, and for what it writes."""
    of = {name: round(SPEEDS[side] / found[name][column], 2) for name, column in reading}
    return of | {name: round(SPEEDS[side] / found[name]["here"], 2) for name in (f"copy {side}x{side}", stored)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photographs", help="folder of photographs")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each way of each step")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = decoding(options.photographs, options.seconds) | cropping(options.photographs, options.seconds)
    found |= storing(options.seconds) | from_bucket(options.photographs, options.seconds / 4)
    small = cores(found, [("PNG 32x32 -> 32", "fast"), ("32x32 in memory", "here")], "write 8x8x16, 8 bits", 32)
    large = cores(
        found, [("JPEG 500x375 -> 256", "fast"), ("boxes of 500x375 -> 256", "fast")], "write 32x32x64, 8 bits", 256
    )
    print(json.dumps({"name": "feed", "per_core_s": found, "cores": {"32x32": small, "256x256": large}}))


if __name__ == "__main__":
    main()
