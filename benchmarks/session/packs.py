"""Images that travel to a machine without a network, in packs of limited size.

A folder of sheets has {train,test}_NN.webp, each 1,000 images of 32x32 pixels as a lossless mosaic of 25 rows, and
labels.npz with train_labels and test_labels. A pack is a plain tar of some sheets and the labels of all images.
"""

import io
import json
import re
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROWS, COLUMNS, SIDE = 25, 40, 32
SHEET = ROWS * COLUMNS  # images
LABELS = "labels.npz"
NAME = re.compile(r"(train|test)_(\d{2})\.webp")
SPLITS = ("test", "train")  # the test images travel first: every figure needs them
BLOCK, ENDING = 512, 10240  # bytes: a tar's padding, and what follows its last file
UNPACKED = "unpacked.json"  # the sheets that the arrays beside it were made from


def pack(images: Path, out: Path, mib: float) -> list[Path]:
    """Write OUT/images-0.tar, images-1.tar, ... of at most so many MiB; return them. Test images come first."""
    labels, sheets = images / LABELS, sheets_of(images)
    if not labels.is_file() or not sheets:
        raise SystemExit(f"{images}: expected {LABELS} and train_NN.webp, test_NN.webp; name a folder of sheets")
    space = mib * 2**20 - ENDING - _bytes_in_tar(labels)
    largest = max(map(_bytes_in_tar, sheets))
    if space < largest:
        raise SystemExit(f"--mib {mib:g}: a sheet of images has {largest / 2**20:.1f} MiB; give more")
    groups: list[list[Path]] = [[]]
    for sheet in sheets:
        if sum(map(_bytes_in_tar, groups[-1])) + _bytes_in_tar(sheet) > space:
            groups.append([])
        groups[-1].append(sheet)
    out.mkdir(parents=True, exist_ok=True)
    packs = [out / f"images-{number}.tar" for number in range(len(groups))]
    for path, group in zip(packs, groups):
        with tarfile.open(path, "w") as archive:
            for file in [labels, *group]:
                archive.add(file, file.name, filter=_anonymous)
    return packs


def sheets_of(folder: Path) -> list[Path]:
    """Return the sheets in a folder, those of the test split first."""
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: (SPLITS.index(path.name.partition("_")[0]), path.name))


def prepare(given: Path | None, cache: Path) -> tuple[Path, dict[str, int]]:
    """Return a folder of train.npz and test.npz, and how many images each has.

    `given` has these arrays already, or packs, or sheets; packs add to what the cache holds from earlier calls.
    """
    if given is not None and all((given / f"{split}.npz").is_file() for split in SPLITS):
        return given, {split: _count(given / f"{split}.npz") for split in SPLITS}
    cache.mkdir(parents=True, exist_ok=True)
    if given is not None:
        for path in sorted(given.glob("*.tar")):
            for name, data in _members(path):
                _write(cache / name, data)
        for path in [given / LABELS, *sheets_of(given)]:
            if path.is_file() and not (cache / path.name).exists():
                _write(cache / path.name, path.read_bytes())
    sheets = [path.name for path in sheets_of(cache)]
    missing = [split for split in SPLITS if not any(name.startswith(split) for name in sheets)]
    if missing or not (cache / LABELS).is_file():
        where = given or cache
        raise SystemExit(
            f"{where}: holds no {' and no '.join(missing) or 'labels of'} images; give --images a folder of train.npz "
            f"and test.npz, or of what --pack wrote, images-0.tar first"
        )
    _make_arrays(cache, sheets)
    return cache, {split: SHEET * sum(name.startswith(split) for name in sheets) for split in SPLITS}


def _make_arrays(cache: Path, sheets: list[str]) -> None:
    """Write the arrays of these sheets, unless those there are of the same ones."""
    record = cache / UNPACKED
    if record.exists() and json.loads(record.read_text()) == sheets:
        return
    with np.load(cache / LABELS, allow_pickle=False) as labels, ThreadPoolExecutor() as pool:
        for split in SPLITS:
            names = [name for name in sheets if name.startswith(split)]
            numbers = [int(NAME.fullmatch(name)[2]) for name in names]  # type: ignore[index]
            rows = np.concatenate([np.arange(SHEET * n, SHEET * (n + 1)) for n in numbers])
            images = np.concatenate(list(pool.map(lambda name: read_sheet(cache / name), names)))
            buffer = io.BytesIO()
            np.savez(buffer, images=images, labels=labels[f"{split}_labels"][rows])
            _write(cache / f"{split}.npz", buffer.getvalue())
    _write(record, json.dumps(sheets).encode())


def read_sheet(path: Path) -> np.ndarray:
    """Return the images of one sheet, uint8 [1000, 32, 32, 3]."""
    from PIL import Image

    pixels = np.asarray(Image.open(path).convert("RGB"))
    return pixels.reshape(ROWS, SIDE, COLUMNS, SIDE, 3).transpose(0, 2, 1, 3, 4).reshape(SHEET, SIDE, SIDE, 3)


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of a pack's files; nothing else that a tar may hold is written."""
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isfile() else None
            if file is not None and (member.name == LABELS or NAME.fullmatch(member.name)):
                yield member.name, file.read()


def _write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(data)
    partial.replace(path)


def _count(path: Path) -> int:
    with np.load(path, allow_pickle=False) as arrays:
        return len(arrays["labels"])


def _bytes_in_tar(path: Path) -> int:
    return BLOCK + -(-path.stat().st_size // BLOCK) * BLOCK


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Leave out owner and time: packs of the same images are the same bytes."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member
