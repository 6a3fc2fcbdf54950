"""Find the images of a plan by their keys, so that images added, removed or changed since shift no other row."""

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

_listed: "dict[str, PlannedImages]" = {}  # at most one entry: the current run's

_listing = threading.Lock()

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
    """An image source as it is now, read by the keys and version tokens of a plan."""

    def __init__(self, config: ImagesConfig, augmentation: AugmentationConfig) -> None:
        # All splits and no limit: one more file may move others to the other split or beyond the limit.
        self.images: Images = open_images(config.model_copy(update={"limit": None, "classes": None}))
        self._augmentation = Augmentation(augmentation, self.images.resolution)
        splits = self.images.splits.items()
        self._positions = {key: (name, row) for name, split in splits for row, key in enumerate(split.keys)}

    def read(self, rows: RowTable) -> ImageBatch:
        """Read the planned rows, in the plan's order. One that is missing or has changed is bad, with a reason."""
        count, side = len(rows.keys), self.images.resolution
        whole = ImageBatch(
            images=np.zeros((count, side, side, self.images.channels), np.uint8),
            good=np.zeros(count, bool),
            reasons={p: "no longer there" for p, key in enumerate(rows.keys) if key not in self._positions},
            sha256=np.zeros((count, 32), np.uint8),
            tokens=list(rows.tokens),
        )
        for name in self.images.splits:
            here = [p for p, key in enumerate(rows.keys) if self._positions.get(key, ("", 0))[0] == name]
            if here:
                numbers = [int(rows.augmentations[p]) for p in here]
                views = [
                    self._augmentation.view(rows.keys[p], number) if number else None
                    for p, number in zip(here, numbers, strict=True)
                ]
                read = self.images.split(name).read([self._positions[rows.keys[p]][1] for p in here], views)
                _put(whole, here, read)
        return whole

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


def planned_images(config: ImagesConfig, augmentation: AugmentationConfig, run: str) -> PlannedImages:
    """Open the source; groups of one run in one process share the listing of the first group.

    Listing a large folder or reading a large array may take longer than encoding a group. Versions are still checked
    when an image is read; only an image that reappeared after the listing counts as missing. The listing is kept until
    `forget_images` or until another run; "" is no run.
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
    """Discard the listing that planned_images keeps."""
    with _listing:
        _listed.clear()


def some(keys: set[str]) -> str:
    """Name the first few, for a message."""
    return ", ".join(sorted(keys)[:NAMED_KEYS]) + (", ..." if len(keys) > NAMED_KEYS else "")


def of_split(split: ImageSplit, augmentations: int = 0) -> RowTable:
    """Return every image of a split and `augmentations` augmentations of each."""
    each = 1 + augmentations
    keys, tokens = ([value for value in column for _ in range(each)] for column in (split.keys, split.tokens))
    labels = np.repeat(np.asarray(split.labels, np.int32), each)
    return RowTable.of(keys, labels, tokens, np.tile(np.arange(each, dtype=np.int32), len(split)))


def _put(whole: ImageBatch, here: Sequence[int], part: ImageBatch) -> None:
    """Put what was read from one split into its positions, if it is the planned version."""
    for found, position in enumerate(here):
        whole.sha256[position] = part.sha256[found]
        if part.tokens[found] not in ("", whole.tokens[position]):  # "": not even its version could be read
            whole.reasons[position] = "changed since it was planned"
        elif not part.good[found]:
            whole.reasons[position] = part.reasons[found]
        else:
            whole.images[position] = part.images[found]
            whole.good[position] = True
