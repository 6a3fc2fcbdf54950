"""A folder of images that tests change between encoding runs."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from functa.storage.functaset.functaset import Functaset
from functa.tasks.encoding.plan import EncodeJob, plan
from tests.helpers.tasks.encoding import encode_job


def write_image(folder: Path, name: str, seed: int) -> None:
    """Write an image whose content and file time follow from the seed."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8), np.uint8)).save(path)
    os.utime(path, ns=(10**18 + seed, 10**18 + seed))  # one content, one version token


def write_source(folder: Path, n: int = 30) -> None:
    """Write n training images and 6 test images of the classes a and b."""
    for split, count in (("train", n), ("test", 6)):
        for i in range(count):
            write_image(folder, f"{split}/{'ab'[i % 2]}/{i:03d}.png", 1000 * (split == "test") + i)


def job_on_source(field: Path, tmp_path: Path, *overrides: str) -> EncodeJob:
    """Return the job that encodes the folder tmp_path/x into tmp_path/s."""
    return encode_job(
        field, tmp_path / "s", "images.source=folder", "images.channels=1", f"images.location={tmp_path / 'x'}",
        "encode.quantization.max_clip_fraction=1", "images.max_bad_fraction=0.2", "encode.shard_rows=8",
        "encode.chunk_rows=8", *overrides,
    )[0]  # fmt: skip


def stored_codes(tmp_path: Path, split: str = "train") -> dict[tuple[str, int], bytes]:
    """Return the codes of all visible rows by (key, augmentation)."""
    loaded = Functaset.open(str(tmp_path / "s")).load(split)
    assert loaded.codes is not None
    names = zip(loaded.keys, loaded.augmentation.tolist(), strict=True)
    return dict(zip(names, map(bytes, loaded.codes), strict=True))


def planned_images(job: EncodeJob) -> int:
    """Return how many rows the job would encode now."""
    return sum(group.images for group in plan(job).groups)
