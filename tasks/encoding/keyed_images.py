"""Find the images of a plan by their keys, so that images added, removed or changed since shift no other row."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from functa.storage.config import ImagesConfig
from functa.storage.errors import StorageError
from functa.storage.functaset.plan import Name, RowTable, row_id
from functa.storage.images.source import ImageBatch, Images, ImageSplit, open_images, open_keys
from functa.storage.texts import Texts
from functa.tasks.config import AugmentationConfig
from functa.tasks.encoding.augment import Augmentation

_opened: "dict[str, PlannedImages]" = {}  # at most one entry: the current run's

_opening = threading.Lock()

NAMED_KEYS = 5  # in a message

READ_ROWS = 256  # images in memory at once while their digests are compared


@dataclass(frozen=True)
class Former:
    """The known facts about an encoded row: its key or "", label, and its image's token and sha256."""

    key: str
    token: str | None
    sha256: bytes | None
    label: int | None


class PlannedImages:
    """Images of shape [H, W, C] read by the keys and version tokens of a plan; no source of files is listed for it."""

    def __init__(self, config: ImagesConfig, augmentation: AugmentationConfig, shape: tuple[int, int, int]) -> None:
        self._of_keys, self._shape = open_keys(config, shape), shape
        self._augmentation = Augmentation(augmentation, shape[0])

    def read(self, rows: RowTable) -> ImageBatch:
        """Read the planned rows, in the plan's order. One that is missing or has changed is bad, with a reason."""
        views = [
            self._augmentation.view(key, number) if number else None
            for key, number in zip(rows.keys, rows.augmentations.tolist(), strict=True)
        ]
        keys = list(dict.fromkeys(rows.keys))  # of several augmentations an image is read once
        number = {key: i for i, key in enumerate(keys)}
        read = self._of_keys(keys).read([number[key] for key in rows.keys], views)
        good, reasons = read.good.copy(), dict(read.reasons)
        for row, (token, planned) in enumerate(zip(read.tokens, rows.tokens, strict=True)):
            if token not in ("", planned):  # "": not even its version could be read
                good[row], reasons[row] = False, "changed since it was planned"
        read.images[~good] = 0
        return ImageBatch(read.images, good, reasons, read.sha256, list(rows.tokens))


class KnownImages:
    """An image source as it is now, in which images are found by their ids."""

    def __init__(self, config: ImagesConfig) -> None:
        # All splits and no limit: one more file may move others to the other split or beyond the limit.
        self.images: Images = open_images(config.model_copy(update={"limit": None, "classes": None}))
        splits = self.images.splits.items()
        self._positions = {key: (name, row) for name, split in splits for row, key in enumerate(split.keys)}

    def again(self, former: Mapping[Name, Former], skip_lost: bool = False) -> RowTable:
        """Return the rows of these names, in any split, with the labels that they had.

        Raises StorageError if an image is missing or has changed; with skip_lost it is left out. Changed means other
        bytes or, if its sha256 is no longer known, another version token.
        """
        found = {row_id(key): key for key in self._positions}
        missing = {row.key or name[0].hex() for name, row in former.items() if name[0] not in found}
        here = {name: found[name[0]] for name in former if name[0] in found}
        changed = self._changed({key: former[name] for name, key in here.items()})
        if not skip_lost and (missing or changed):
            both = (("are missing", missing), ("changed", changed))
            fault = " and ".join(f"{len(keys)} {what} ({some(keys)})" for what, keys in both if keys)
            count = len({name[0] for name in former})
            raise StorageError(
                f"of {count} images of damaged shards {fault}; restore them, or the damaged objects from a copy, "
                "or retire their rows: --retire-lost"
            )
        kept = {name: key for name, key in here.items() if key not in changed}
        positions = [self._positions[key] for key in kept.values()]
        today = [self.images.split(name).labels[row] for name, row in positions]
        labels = [now if (label := former[name].label) is None else label for name, now in zip(kept, today)]
        tokens = [self.images.split(name).tokens[row] for name, row in positions]
        numbers = np.array([number for _, number in kept], np.int32)
        return RowTable.of(list(kept.values()), np.array(labels, np.int32), tokens, numbers)

    def _changed(self, former: Mapping[str, Former]) -> set[str]:
        """Return the keys of the images that have changed or cannot be read."""
        changed = set()
        sha256 = {key: row.sha256 for key, row in former.items() if row.sha256 is not None}
        for split in self.images.splits:
            of_split = self.images.split(split)
            for key in (key for key in former if self._positions[key][0] == split and key not in sha256):
                token = former[key].token
                changed |= {key} if token not in (None, of_split.tokens[self._positions[key][1]]) else set()
            keys = [key for key in sha256 if self._positions[key][0] == split]
            for start in range(0, len(keys), READ_ROWS):
                some = keys[start : start + READ_ROWS]
                batch = of_split.read([self._positions[key][1] for key in some])
                changed |= {key for key, found in zip(some, batch.sha256, strict=True) if bytes(found) != sha256[key]}
        return changed


def planned_images(
    config: ImagesConfig, augmentation: AugmentationConfig, shape: tuple[int, int, int], run: str
) -> PlannedImages:
    """Open the source; groups of one run in one process share it, with the arrays or indexes that it holds.

    Versions are still checked when an image is read. It is kept until `forget_images` or until another run; "" is no
    run.
    """
    if not run:
        return PlannedImages(config, augmentation, shape)
    with _opening:
        if run not in _opened:
            opened = PlannedImages(config, augmentation, shape)
            _opened.clear()
            _opened[run] = opened
        return _opened[run]


def forget_images() -> None:
    """Discard what planned_images keeps."""
    with _opening:
        _opened.clear()


def some(keys: set[str]) -> str:
    """Name the first few, for a message."""
    return ", ".join(sorted(keys)[:NAMED_KEYS]) + (", ..." if len(keys) > NAMED_KEYS else "")


def of_split(split: ImageSplit, augmentations: int = 0) -> RowTable:
    """Return every image of a split and `augmentations` augmentations of each."""
    each = 1 + augmentations
    labels = np.repeat(np.asarray(split.labels, np.int32), each)
    numbers = np.tile(np.arange(each, dtype=np.int32), len(split))
    return RowTable.of(Texts.of(split.keys).repeat(each), labels, Texts.of(split.tokens).repeat(each), numbers)
