"""Compare an image source with the functaset: new images are encoded, rows of missing ones are retired.

An image is unchanged if its version token and label are the same. A changed image gets new rows, and its old rows are
retired in the same commit, as are those of missing images. Images that were retired by name are not encoded again.
A location that is not mounted looks like one whose images are missing, so the operator must confirm a great loss.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from functa.storage.config import ImagesConfig
from functa.storage.errors import StorageError
from functa.storage.functaset.fragment import Shard, live_shards, shown_fragments
from functa.storage.functaset.history import Commit
from functa.storage.functaset.plan import RowTable
from functa.storage.functaset.quantizer import Quantizer
from functa.storage.images.source import open_images
from functa.storage.places.location import Location
from functa.storage.places.side_by_side import side_by_side
from functa.tasks.encoding.keyed_images import some


@dataclass(frozen=True)
class Changes:
    """Rows to encode, and rows of fragments to retire.

    known: how many images of each label the functaset has of the split; missing: labels of those that the source's
    split lacks, by key.
    """

    rows: RowTable
    retire: dict[str, list[int]]
    known: Counter[int]
    missing: dict[str, int]


@dataclass
class _Known:
    """An image in the functaset: token, label, (fragment, row) pairs, augmentations, whether a row is bad."""

    token: str
    label: int
    rows: list[tuple[str, int]] = field(default_factory=list)
    augmentations: set[int] = field(default_factory=set)
    bad: bool = False


def changes(location: Location, newest: Commit, split: str, source: RowTable, retry_bad: bool = False) -> Changes:
    """Return the changes of one split. retry_bad: images with a bad row are encoded again.

    Raises MissingObject, DamagedObject.
    """
    known = _known(location, newest, split)
    wanted: list[int] = []
    retire: dict[str, list[int]] = {}
    seen: set[str] = set()
    for key, token, rows in _images(source):
        seen.add(key)
        found = known.get(key)
        if newest.retires(key):
            _retire(retire, found)
            continue
        numbers = {int(source.augmentations[row]) for row in rows}
        same = found and (found.token, found.label) == (token, int(source.labels[rows[0]]))
        if found and same and found.augmentations == numbers and not (retry_bad and found.bad):
            continue
        wanted += rows
        _retire(retire, found)
    missing = {key: image.label for key, image in known.items() if key not in seen}
    for key in missing:
        _retire(retire, known[key])
    return Changes(source.take(wanted), retire, Counter(image.label for image in known.values()), missing)


def refuse_great_loss(found: Mapping[str, Changes], config: ImagesConfig) -> None:
    """Raise StorageError if more than images.max_gone_fraction of all images are missing, or a class of a split."""
    if config.max_gone_fraction == 1 or not any(each.missing for each in found.values()):
        return
    # New files may have moved them to the other split, or beyond the limit: those are not missing.
    splits = open_images(config.model_copy(update={"limit": None, "classes": None})).splits.values()
    here = {key for split in splits for key in split.keys}
    missing = {name: {key: n for key, n in each.missing.items() if key not in here} for name, each in found.items()}
    everything = {key for keys in missing.values() for key in keys}
    known = sum(each.known.total() for each in found.values())
    fault = ""
    for split, keys in missing.items():
        for label, count in Counter(keys.values()).items():
            if count == found[split].known[label]:
                fault = f"all of a class of split '{split}' among them"
    if len(everything) > config.max_gone_fraction * known:
        fault = f"more than images.max_gone_fraction={config.max_gone_fraction:g} allows"
    if fault:
        raise StorageError(
            f"{config.location or config.source}: {len(everything)} of {known} encoded images are missing "
            f"({some(everything)}), {fault}; mount or restore them, or retire their rows: "
            "functa encode --retire-lost"
        )


def stored_quantizer(location: Location, newest: Commit) -> Quantizer | None:
    """Return the quantiser of the functaset's rows: its ranges were fixed when the first fragment was planned."""
    return next((each.quantizer for each in shown_fragments(location, newest) if each.quantizer is not None), None)


def _images(source: RowTable) -> Iterator[tuple[str, str, list[int]]]:
    """Yield (key, token, rows) of each image; an image's rows are adjacent."""
    start = 0
    for row in range(1, len(source.keys) + 1):
        if row == len(source.keys) or source.keys[row] != source.keys[start]:
            yield source.keys[start], source.tokens[start], list(range(start, row))
            start = row


def _retire(retire: dict[str, list[int]], found: _Known | None) -> None:
    for fragment, row in found.rows if found else ():
        retire.setdefault(fragment, []).append(row)


def _known(location: Location, newest: Commit, split: str) -> dict[str, _Known]:
    """Return every image of the split that is not retired, bad ones too, by key."""
    known: dict[str, _Known] = {}
    shards = list(live_shards(location, newest, split))
    for shard, table in zip(shards, side_by_side(location, Shard.table, shards), strict=True):
        _add(known, shard, table)
    return known


def _add(known: dict[str, _Known], shard: Shard, table: RowTable) -> None:
    bad = set(shard.bad.tolist())
    for row in np.flatnonzero(~shard.retired).tolist():
        image = known.setdefault(table.keys[row], _Known(table.tokens[row], int(table.labels[row])))
        image.rows.append((shard.fragment.id, shard.first + row))
        image.augmentations.add(int(table.augmentations[row]))
        image.bad |= row in bad
        if image.token != table.tokens[row]:
            image.token = ""  # rows of two versions: encode it again
