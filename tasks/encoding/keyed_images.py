"""The images of a plan, found again by their keys: what came, went or changed since then shifts no other row."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from functa.storage.config import ImagesConfig
from functa.storage.errors import StorageError
from functa.storage.functaset.plan import Name, RowTable, row_id
from functa.storage.images.source import ImageBatch, Images, ImageSplit, open_images
from functa.tasks.config import AugmentationConfig
from functa.tasks.encoding.augment import Augmentation

_listed: "dict[str, PlannedImages]" = {}  # of one run at most

_listing = threading.Lock()

NAMED = 5  # keys that a message names

READ_ROWS = 256  # images in memory at once while their digests are compared


@dataclass(frozen=True)
class Former:
    """What is still known of a row that was encoded: its key or "", label, and its image's token and sha256."""

    key: str
    token: str | None
    sha256: bytes | None
    label: int | None


class PlannedImages:
    """An image source as it is now, read by the keys and version tokens of a plan."""

    def __init__(self, config: ImagesConfig, augmentation: AugmentationConfig) -> None:
        # Of all splits and without a limit: one file more moves others over either border.
        self.images: Images = open_images(config.model_copy(update={"limit": None, "classes": None}))
        self._augmentation = Augmentation(augmentation, self.images.resolution)
        splits = self.images.splits.items()
        self._places = {key: (name, row) for name, split in splits for row, key in enumerate(split.keys)}

    def read(self, rows: RowTable) -> ImageBatch:
        """The planned rows, in the plan's order. One that is gone or of another version is bad, with its reason."""
        count, side = len(rows.keys), self.images.resolution
        whole = ImageBatch(
            images=np.zeros((count, side, side, self.images.channels), np.uint8),
            good=np.zeros(count, bool),
            reasons={p: "no longer there" for p, key in enumerate(rows.keys) if key not in self._places},
            sha256=np.zeros((count, 32), np.uint8),
            tokens=list(rows.tokens),
        )
        for name in self.images.splits:
            here = [p for p, key in enumerate(rows.keys) if self._places.get(key, ("", 0))[0] == name]
            if here:
                numbers = [int(rows.augmentations[p]) for p in here]
                views = [
                    self._augmentation.view(rows.keys[p], number) if number else None
                    for p, number in zip(here, numbers, strict=True)
                ]
                read = self.images.split(name).read([self._places[rows.keys[p]][1] for p in here], views)
                _put(whole, here, read)
        return whole

    def again(self, former: Mapping[Name, Former], leave_lost: bool = False) -> RowTable:
        """The rows of these names, in any split, with the labels that they had.

        Raises StorageError where an image is gone or changed; with leave_lost they are left out. Changed means other
        bytes or, where their sha256 is not known any more, another version token.
        """
        found = {row_id(key): key for key in self._places}
        gone = {row.key or name[0].hex() for name, row in former.items() if name[0] not in found}
        here = {name: found[name[0]] for name in former if name[0] in found}
        changed = self._changed({key: former[name] for name, key in here.items()})
        if not leave_lost and (gone or changed):
            both = (("are gone", gone), ("changed", changed))
            fault = " and ".join(f"{len(keys)} {what} ({some(keys)})" for what, keys in both if keys)
            count = len({name[0] for name in former})
            raise StorageError(
                f"of {count} images of damaged shards {fault}; restore them, or the damaged objects from a copy, "
                "or give their rows up: --retire-lost"
            )
        kept = {name: key for name, key in here.items() if key not in changed}
        places = [self._places[key] for key in kept.values()]
        today = [self.images.split(name).labels[row] for name, row in places]
        labels = [now if (label := former[name].label) is None else label for name, now in zip(kept, today)]
        tokens = [self.images.split(name).tokens[row] for name, row in places]
        numbers = np.array([number for _, number in kept], np.int32)
        return RowTable.of(list(kept.values()), np.array(labels, np.int32), tokens, numbers)

    def _changed(self, former: Mapping[str, Former]) -> set[str]:
        """Keys of the images that are not what they were, or cannot be read."""
        changed = set()
        sha256 = {key: row.sha256 for key, row in former.items() if row.sha256 is not None}
        for split in self.images.splits:
            of_split = self.images.split(split)
            for key in (key for key in former if self._places[key][0] == split and key not in sha256):
                token = former[key].token
                changed |= {key} if token not in (None, of_split.tokens[self._places[key][1]]) else set()
            keys = [key for key in sha256 if self._places[key][0] == split]
            for start in range(0, len(keys), READ_ROWS):
                some = keys[start : start + READ_ROWS]
                batch = of_split.read([self._places[key][1] for key in some])
                changed |= {key for key, found in zip(some, batch.sha256, strict=True) if bytes(found) != sha256[key]}
        return changed


def planned_images(config: ImagesConfig, augmentation: AugmentationConfig, run: str) -> PlannedImages:
    """The source as it is now; for groups of one run in one process, as it was when the first of them opened it.

    To list a large folder, or to read a large array, takes longer than many a group. Nothing is read that is not of
    the planned version: only an image that came back in between counts as gone. Kept until `forget_images`, or until
    another run; "" is no run.
    """
    if not run:
        return PlannedImages(config, augmentation)
    with _listing:
        if run not in _listed:
            opened = PlannedImages(config, augmentation)
            _listed.clear()
            _listed[run] = opened
        return _listed[run]


def forget_images() -> None:
    """Lets go of what planned_images has kept."""
    with _listing:
        _listed.clear()


def some(keys: set[str]) -> str:
    """The first few by name, for a message."""
    return ", ".join(sorted(keys)[:NAMED]) + (", ..." if len(keys) > NAMED else "")


def of_split(split: ImageSplit, augmentations: int = 0) -> RowTable:
    """Every image of a split as it is, and so many augmentations of each."""
    each = 1 + augmentations
    keys, tokens = ([value for value in column for _ in range(each)] for column in (split.keys, split.tokens))
    labels = np.repeat(np.asarray(split.labels, np.int32), each)
    return RowTable.of(keys, labels, tokens, np.tile(np.arange(each, dtype=np.int32), len(split)))


def _put(whole: ImageBatch, here: Sequence[int], part: ImageBatch) -> None:
    """What was read of one split into its places, as far as it is the version that was planned."""
    for found, position in enumerate(here):
        whole.sha256[position] = part.sha256[found]
        if part.tokens[found] not in ("", whole.tokens[position]):  # "": not even its version could be read
            whole.reasons[position] = "changed since it was planned"
        elif not part.good[found]:
            whole.reasons[position] = part.reasons[found]
        else:
            whole.images[position] = part.images[found]
            whole.good[position] = True
