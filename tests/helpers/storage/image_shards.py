"""The same 24 images as class folders, a flat folder, tars and tables."""

import csv
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from PIL import Image
from pyarrow import ipc, parquet

from functa.storage.config import ImagesConfig
from functa.storage.images.source import Images, open_images
from tests.helpers.storage.image_files import encoded, noise

Sample = tuple[str, str, int, np.ndarray]  # key, split, label, pixels

SAMPLES: list[Sample] = [
    (f"{split}/{label}/{i:03d}", split, label, noise(1000 * label + i))
    for split in ("train", "test")
    for label in (0, 1, 2)
    for i in range(4)
]


def png(pixels: np.ndarray) -> bytes:
    return encoded(Image.fromarray(pixels))


def write_tar(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> Path:
    """Write samples as WebDataset does: members of one name, one ending each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, parts in samples:
            for ending, data in parts.items():
                member = tarfile.TarInfo(f"{name}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def members_of(path: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(path) as tar:
        return tar.getmembers()


def cls(samples: Sequence[Sample]) -> list[tuple[str, dict[str, bytes]]]:
    return [(key.replace("/", "_"), {"png": png(x), "cls": str(label).encode()}) for key, _, label, x in samples]


def opened(location: object, source: str, **settings: Any) -> Images:
    return open_images(ImagesConfig(source=source, location=str(location), **settings))


def rows(images: Images, split: str) -> list[tuple[int, bytes]]:
    """Return label and pixels of each row, in an order that names do not decide."""
    part = images.split(split)
    batch = part.read(range(len(part)))
    assert batch.good.all(), batch.reasons
    return sorted((int(label), pixels.tobytes()) for label, pixels in zip(part.labels, batch.images))


def of(split: str, samples: Sequence[Sample] = SAMPLES) -> list[Sample]:
    return [sample for sample in samples if sample[1] == split]


def expected(split: str) -> list[tuple[int, bytes]]:
    return sorted((label, pixels.tobytes()) for _, _, label, pixels in of(split))


def as_tars(folder: Path, samples: Sequence[Sample] = SAMPLES, shards: int = 3) -> Path:
    for split in ("train", "test"):
        for shard in range(shards):
            write_tar(folder / f"set-{split}-{shard:06d}.tar", cls(of(split, samples)[shard::shards]))
    return folder


def as_folders(folder: Path, test: str = "test", samples: Sequence[Sample] = SAMPLES) -> Path:
    for key, split, label, pixels in samples:
        path = folder / {"train": "train", "test": test}[split] / str(label) / f"{key.rpartition('/')[2]}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(pixels))
    return folder


def as_tables(folder: Path, names: bool = True, samples: Sequence[Sample] = SAMPLES, group: int = 3) -> Path:
    """Write Parquet files as Hugging Face does, in groups of so many rows."""
    folder.mkdir(parents=True)
    for split, file in (("train", "train"), ("test", "validation")):
        info = {"info": {"features": {"label": {"names": ["zero", "one", "two"], "_type": "ClassLabel"}}}}
        table = pyarrow.table(
            {
                "image": [
                    {"bytes": png(pixels), "path": f"{i}.png"} for i, (*_, pixels) in enumerate(of(split, samples))
                ],
                "label": [label for _, _, label, _ in of(split, samples)],
            }
        ).replace_schema_metadata({"huggingface": json.dumps(info)} if names else None)
        parquet.write_table(table, folder / f"{file}-00000-of-00001.parquet", row_group_size=group)
    return folder


def as_arrays(folder: Path, samples: Sequence[Sample] = SAMPLES) -> Path:
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        images, labels = np.stack([x for *_, x in of(split, samples)]), [n for _, _, n, _ in of(split, samples)]
        np.savez(folder / f"{split}.npz", images=images, labels=np.array(labels))
    return folder


def as_arrow(folder: Path) -> Path:
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        table = pyarrow.table(
            {"img": [png(x) for *_, x in of(split)], "label": [label for _, _, label, _ in of(split)]}
        )
        with ipc.new_stream(folder / split / "data-00000-of-00001.arrow", table.schema) as file:
            file.write_table(table, max_chunksize=5)
    return folder


def as_flat(folder: Path) -> Path:
    for key, split, _, pixels in SAMPLES:
        (folder / split).mkdir(parents=True, exist_ok=True)
        (folder / split / f"{key.replace('/', '_')}.png").write_bytes(png(pixels))
    with open(folder / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows((f"{s}/{key.replace('/', '_')}.png", label) for key, s, label, _ in SAMPLES)
    return folder


FORMS: dict[str, Callable[[Path], tuple[Path, str, dict[str, Any]]]] = {
    "train and test": lambda p: (as_folders(p / "d", "test"), "folder", {}),
    "train and val": lambda p: (as_folders(p / "d", "val"), "folder", {}),
    "train and validation": lambda p: (as_folders(p / "d", "validation"), "folder", {}),
    "a table of labels": lambda p: (as_flat(p / "d"), "folder", {"labels": str(p / "d/labels.csv")}),
    "tars": lambda p: (as_tars(p / "d"), "webdataset", {}),
    "tars by a pattern": lambda p: (as_tars(p / "d") / "set-{train,test}-{000000..000002}.tar", "webdataset", {}),
    "tars by a star": lambda p: (as_tars(p / "d") / "set-*.tar", "webdataset", {}),
    "Parquet with class names": lambda p: (as_tables(p / "d"), "parquet", {}),
    "Parquet with numbers": lambda p: (as_tables(p / "d", names=False), "parquet", {}),
    "Arrow": lambda p: (as_arrow(p / "d"), "parquet", {}),
}
