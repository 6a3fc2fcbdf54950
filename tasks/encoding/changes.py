"""Compare an image source with the functaset: new images are encoded, rows of missing ones are retired.

An image is unchanged if its version token and label are the same. A changed image gets new rows, and its old rows are
retired in the same commit, as are those of missing images. Images that were retired by name are not encoded again.
A location that is not mounted looks like one whose images are missing, so the operator must confirm a great loss.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from functa.storage.config import ImagesConfig
from functa.storage.errors import StorageError
from functa.storage.functaset.fragment import Fragment, shown_fragments
from functa.storage.functaset.history import Commit
from functa.storage.functaset.plan import RowTable
from functa.storage.functaset.quantizer import Quantizer
from functa.storage.functaset.shards.shard import Shard
from functa.storage.images.source import open_images
from functa.storage.places.location import Location
from functa.storage.places.side_by_side import side_by_side
from functa.storage.texts import Index, equal, runs, taken
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


@dataclass(frozen=True)
class _Rows:
    """Rows of the functaset that are not retired, bad ones too, beside the images of a source.

    images int64 [n]: number of each one's image in the source, -1 where it has none; same bool [n]: it is of the
    source's version and label; labels, augmentations int32 [n]; bad bool [n]; fragments int32 [n]: the number of each
    one's fragment, rows int64 [n]: its row there; missing: keys of the rows without an image, in order.
    """

    missing: list[str]
    images: np.ndarray
    same: np.ndarray
    labels: np.ndarray
    augmentations: np.ndarray
    bad: np.ndarray
    fragments: np.ndarray
    rows: np.ndarray


def changes(location: Location, newest: Commit, split: str, source: RowTable, retry_bad: bool = False) -> Changes:
    """Return the changes of one split. retry_bad: images with a bad row are encoded again.

    Raises MissingObject, DamagedObject.
    """
    which, _ = runs(source.keys)  # an image's rows are adjacent
    image_of = np.arange(len(source)) if which is None else which
    images = source.take(np.flatnonzero(np.diff(image_of, prepend=-1)))
    fragments = list(shown_fragments(location, newest, split))
    known = _known(fragments, images)
    there = np.flatnonzero(known.images >= 0)
    of, count = known.images[there], len(images)
    width = 1 + max(source.augmentations.max(initial=0), known.augmentations.max(initial=0))
    planned = np.isin(of * width + known.augmentations[there], image_of * width + source.augmentations)
    stored = np.bincount(of, minlength=count)
    good = known.same[there] & planned & ~(known.bad[there] & retry_bad)
    unchanged = (stored == np.bincount(image_of, minlength=count)) & (stored == np.bincount(of[good], minlength=count))
    hidden = _retired(newest, images.keys)
    again = np.append(hidden | ~unchanged, True)  # the last: images that are missing
    out = np.flatnonzero(again[known.images])
    retire = {
        fragment.id: known.rows[out[known.fragments[out] == number]].tolist()
        for number, fragment in enumerate(fragments)
        if (known.fragments[out] == number).any()
    }
    missing: dict[str, int] = {}
    for key, label in zip(known.missing, known.labels[known.images < 0].tolist(), strict=True):
        missing.setdefault(key, label)
    labels = known.labels[there[np.unique(of, return_index=True)[1]]]
    rows = np.flatnonzero((~unchanged & ~hidden)[image_of])
    return Changes(source.take(rows), retire, Counter(labels.tolist()) + Counter(missing.values()), missing)


def refuse_great_loss(found: Mapping[str, Changes], config: ImagesConfig) -> None:
    """Raise StorageError if more than images.max_gone_fraction of all images are missing, or a class of a split."""
    if config.max_gone_fraction == 1 or not any(each.missing for each in found.values()):
        return
    # New files may have moved them to the other split, or beyond the limit: those are not missing.
    splits = open_images(config.model_copy(update={"limit": None, "classes": None})).splits.values()
    lost = {key for each in found.values() for key in each.missing}
    here = {key for split in splits for key in split.keys if key in lost}
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


def _retired(newest: Commit, keys: Sequence[str]) -> np.ndarray:
    """Return bool [n]: which images were retired by name."""
    if not newest.retired_images:
        return np.zeros(len(keys), bool)
    return np.fromiter(map(newest.retires, keys), bool, len(keys))


def _known(fragments: Sequence[Fragment], images: RowTable) -> _Rows:
    """Return every row of a split that is not retired, bad ones too; images: of the source, once each."""
    index, missing = Index(images.keys), list[str]()
    kinds = (np.int64, bool, np.int32, np.int32, bool, np.int32, np.int64)
    parts = [tuple(np.zeros(0, kind) for kind in kinds)]
    for number, fragment in enumerate(fragments):
        tables = side_by_side(fragment.location, Shard.table, fragment.live)
        for shard, whole in zip(fragment.live, tables, strict=True):
            rows, bad = np.flatnonzero(~shard.retired), np.isin(np.arange(shard.size), shard.bad)
            table = whole if len(rows) == len(whole) else whole.take(rows)
            found = index.find(table.keys)
            there = np.flatnonzero(found >= 0)
            same = np.zeros(len(rows), bool)
            same[there] = equal(taken(images.tokens, found[there]), taken(table.tokens, there))
            same[there] &= images.labels[found[there]] == table.labels[there]
            missing += taken(table.keys, np.flatnonzero(found < 0))
            places = (np.full(len(rows), number, np.int32), shard.first + rows)
            parts.append((found, same, table.labels, table.augmentations, bad[rows], *places))
    columns = [np.concatenate(column) for column in zip(*parts)]
    return _Rows(missing, *columns)
