"""Image sources that are arrays: scikit-learn's digits, torchvision sets, npz files. Nothing here unpickles."""

import contextlib
import hashlib
import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from functa.storage.errors import StorageError
from functa.storage.images.files import Decoded, Decoder
from functa.storage.images.rows import Rows, limited, split_rows
from functa.storage.images.source import Images, ImageSplit, Picture, View, seen

if TYPE_CHECKING:
    from functa.storage.config import ImagesConfig

MAX_ARRAY_BYTES = 64 << 30


@dataclass(frozen=True)
class ArraySource:
    """images uint8 [n, H, W, C], labels int32 [n], stable keys, class names."""

    images: np.ndarray
    labels: np.ndarray
    keys: list[str]
    classes: list[str]

    def take(self, rows: np.ndarray) -> "ArraySource":
        return ArraySource(self.images[rows], self.labels[rows], [self.keys[i] for i in rows], self.classes)


def open_digits(config: "ImagesConfig") -> Images:
    return images_of_arrays(config, read_digits(config.test_fraction, config.split_seed))


def open_torchvision(config: "ImagesConfig") -> Images:
    return images_of_arrays(config, read_torchvision(config.location, config.dataset))


def open_npz(config: "ImagesConfig") -> Images:
    return images_of_arrays(config, read_npz(config.location))


def read_digits(test_fraction: float, seed: int) -> dict[str, ArraySource]:
    """scikit-learn's 1,797 digits, 8x8 grey, split over the classes (the file's last 300 are other writers).

    The pixels are whole numbers 0 ... 16; as uint8 round(x 255 / 16), so all 17 levels stay apart.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int32)
    keys = [f"digits/{i:04d}" for i in range(len(labels))]
    whole = ArraySource(images, labels, keys, [str(i) for i in range(10)])
    count = round(test_fraction * len(labels))
    if not 10 <= count <= len(labels) - 10:
        raise StorageError(f"images.test_fraction {test_fraction:g}: of 1797 digits, each split needs 10 at least")
    train, test = train_test_split(np.arange(len(labels)), test_size=count, random_state=seed, stratify=labels)
    return {"train": whole.take(np.sort(train)), "test": whole.take(np.sort(test))}


def read_torchvision(location: str, name: str) -> dict[str, ArraySource]:
    """CIFAR10 or FashionMNIST as torchvision lays them out below a local root. Never downloads."""
    if "://" in location and not location.startswith("file://"):
        raise StorageError(f"{location}: torchvision reads local folders only; copy it here, or use source=folder")
    import torchvision.datasets

    root = Path(location.removeprefix("file://")).expanduser()
    parts = {}
    for split in ("train", "test"):
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                data = getattr(torchvision.datasets, name)(str(root), train=split == "train", download=False)
        except Exception as error:  # RuntimeError for missing files; a damaged one fails in its parser's own way
            inside = {"CIFAR10": "the original cifar-10-batches-py, by md5", "FashionMNIST": "FashionMNIST/raw"}
            raise StorageError(
                f"{root}: torchvision finds no whole {name} there ({type(error).__name__}); expected {inside[name]}, "
                "which this command never downloads; for the same images as files use images.source=folder or npz"
            ) from None
        images = np.asarray(data.data)  # CIFAR10 [n, 32, 32, 3]; FashionMNIST [n, 28, 28]
        keys = [f"{name}/{split}/{i:05d}" for i in range(len(images))]
        parts[split] = ArraySource(_with_channels(images), np.asarray(data.targets, np.int32), keys, list(data.classes))
    return parts


def read_npz(location: str) -> dict[str, ArraySource]:
    """A folder of {train,test}.npz -> both splits; one .npz file -> {"all": ...}, to be split by the caller.

    Each holds images uint8 [n, H, W] or [n, H, W, 1|3] and integer labels [n]; without labels there are no classes.
    """
    if "://" in location and not location.startswith("file://"):
        raise StorageError(f"{location}: npz arrays are read from local disk only; copy them here")
    path = Path(location.removeprefix("file://")).expanduser()
    if path.is_file():
        files = {"all": path}
    else:
        files = {split: path / f"{split}.npz" for split in ("train", "test")}
        for file in files.values():
            if not file.is_file():
                raise StorageError(
                    f"{file}: is missing; images.location is an .npz, or a folder of train.npz, test.npz"
                )
    arrays = {split: _read_arrays(file) for split, file in files.items()}
    with_labels = {split: labels for split, (_, labels) in arrays.items() if labels is not None}
    if missing := sorted(arrays.keys() - with_labels.keys()) if with_labels else []:
        raise StorageError(
            f"{files[missing[0]]}: has no labels, and {min(with_labels)}.npz has; give both of them or none"
        )
    count = max((int(labels.max()) + 1 for labels in with_labels.values()), default=0)
    classes = [str(i) for i in range(count)]
    return {
        split: ArraySource(
            images,
            np.zeros(len(images), np.int32) if labels is None else labels,
            [f"{split}/{i:07d}" for i in range(len(images))],
            classes,
        )
        for split, (images, labels) in arrays.items()
    }


def _read_arrays(file: Path) -> tuple[np.ndarray, np.ndarray | None]:
    fix = "expected images uint8 [n,H,W] or [n,H,W,C] and labels [n] from 0, or images alone, in an .npz"
    try:
        with zipfile.ZipFile(file) as archive:
            names = ["images", "labels"] if "labels.npy" in archive.namelist() else ["images"]
            shapes = {name: _declared(archive, f"{name}.npy") for name in names}
        images_shape = shapes["images"]
        labels_shape = shapes.get("labels", images_shape[:1])
        if len(images_shape) not in (3, 4) or (len(images_shape) == 4 and images_shape[3] not in (1, 3)):
            raise ValueError(f"images have shape {images_shape}")
        if labels_shape != images_shape[:1] or labels_shape[0] == 0:
            raise ValueError(f"labels have shape {labels_shape} for images of shape {images_shape}")
        with np.load(file, allow_pickle=False) as data:
            images, labels = data["images"], data["labels"] if "labels" in shapes else None
        if images.dtype != np.uint8 or (labels is not None and labels.dtype.kind not in "iu"):
            raise ValueError(f"images are {images.dtype}, labels {'' if labels is None else labels.dtype}")
        if labels is not None and (labels.min() < 0 or labels.max() > 1_000_000):
            raise ValueError(f"labels run from {labels.min()} to {labels.max()}")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, MemoryError) as error:
        raise StorageError(f"{file}: {str(error) or type(error).__name__}; {fix}") from None
    return _with_channels(images), None if labels is None else labels.astype(np.int32)


def _declared(archive: zipfile.ZipFile, member: str) -> tuple[int, ...]:
    """The shape that a member's header declares, once the header and the archive agree on its size."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        declared = dtype.itemsize * int(np.prod(shape, dtype=object)) if shape else dtype.itemsize
        if dtype.hasobject or declared > MAX_ARRAY_BYTES:
            raise ValueError(f"{member} declares {declared} bytes of {dtype}")
        if declared != archive.getinfo(member).file_size - file.tell():
            raise ValueError(f"{member} declares {declared} bytes and has another number")
    return tuple(int(n) for n in shape)


def _with_channels(images: np.ndarray) -> np.ndarray:
    """[n, H, W] -> [n, H, W, 1]; uint8 throughout."""
    return np.ascontiguousarray(images[..., None] if images.ndim == 3 else images, dtype=np.uint8)


def images_of_arrays(config: "ImagesConfig", sources: dict[str, ArraySource]) -> Images:
    """Return the images of a source's splits, or of a whole ("all") that is split here."""
    if "all" in sources:
        whole = sources["all"]
        every = Rows(whole.keys, whole.labels, [""] * len(whole.keys), [str(row) for row in range(len(whole.keys))])
        parts = zip(("train", "test"), split_rows(every, config))
        sources = {split: whole.take(np.array([int(row) for row in part.origins])) for split, part in parts}
    train = sources["train"]
    height, width, native = train.images.shape[1:]
    if config.resolution is None and height != width:
        raise StorageError(f"images are {width}x{height} and must be square; set images.resolution")
    resolution = config.resolution or height
    channels = config.channels or native
    splits = {}
    for name, source in sources.items():
        if source.images.shape[1:] != train.images.shape[1:]:
            raise StorageError(f"images of the splits differ: {train.images.shape[1:]} and {source.images.shape[1:]}")
        indices = [str(i) for i in range(len(source.keys))]
        # The label too: a file that changes class changes its key, an array's row does not.
        labelled = zip(source.images, source.labels.astype("<i4"))
        tokens = [hashlib.sha256(image.tobytes() + label.tobytes()).hexdigest()[:16] for image, label in labelled]
        kept = limited(Rows(source.keys, source.labels, tokens, indices), config.limit)
        complete = len(kept.origins) == len(source.images)
        images = source.images if complete else source.images[[int(i) for i in kept.origins]]
        splits[name] = _array_split(kept, images, resolution, channels, config.decoder)
    return Images(channels, resolution, train.classes, splits)


def _array_split(rows: Rows, images: np.ndarray, resolution: int, channels: int, decoder: Decoder) -> ImageSplit:
    as_they_are = images.shape[1:] == (resolution, resolution, channels)

    def read_row(row: int, views: Sequence[View | None] = (None,)) -> Picture:
        from PIL import Image

        raw = images[row]  # [H, W, C]
        sha256 = hashlib.sha256(raw.tobytes()).digest()
        if as_they_are and not any(views):
            return Picture([raw] * len(views), "", sha256, rows.tokens[row])
        image = Image.fromarray(raw[..., 0] if raw.shape[-1] == 1 else raw).convert("L" if channels == 1 else "RGB")
        pixels = seen(Decoded.of(image, decoder), resolution, views)
        return Picture(pixels, "", sha256, rows.tokens[row])

    shape = (resolution, resolution, channels)
    return ImageSplit(rows.keys, rows.labels, rows.tokens, shape, read_row, source=images)
