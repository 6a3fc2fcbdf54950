"""Inputs of feature slices, listed once for all of them: keys and labels of images, and rows of the functaset's shards.

features/latents.json              version of the functaset, and how many rows without augmentation each shard has
features/reference-0003-0257.json  keys and labels of one slice's training images; test-0000-0001.json: of test images
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from functa.storage.functaset.functaset import Functaset
from functa.storage.images.source import Images
from functa.storage.places.address import MAX_STAGE_BYTES, open_location, read_json, write_json
from functa.storage.texts import taken
from functa.tasks.inputs.latents import PlainRows, plain_counts
from functa.tasks.inputs.pictures import spread

LATENTS = "latents.json"

SPLITS = {"reference": "train", "test": "test"}  # the sets of real images, and where they are from


@dataclass(frozen=True)
class RealImages:
    """One slice of a set of real images: the keys and labels of its rows."""

    keys: list[str]
    labels: list[int]


def write_inputs(output: str, images: Images, functaset: str, sets: Mapping[Any, tuple[int, int]]) -> None:
    """Write the inputs of the features in a run's folder; sets: rows and slices of each, of those of SPLITS.

    Of a set that is larger than its rows, these are spread over it.
    """
    location, opened = open_location(f"{output}/features"), Functaset.open(functaset)
    counts = {split: plain_counts(opened, split) for split in SPLITS.values()}
    write_json(location, LATENTS, {"version": opened.version, "counts": counts}, MAX_STAGE_BYTES)
    for kind, split_name in SPLITS.items():
        split, (count, parts) = images.split(split_name), sets[kind]
        chosen = spread(len(split), count)
        for part in range(parts):
            rows = chosen[count * part // parts : count * (part + 1) // parts]
            listed = {"keys": list(taken(split.keys, rows)), "labels": np.asarray(split.labels)[rows].tolist()}
            write_json(location, _listed(kind, part, parts), listed)


def read_listed(output: str, kind: str, part: int, parts: int) -> RealImages:
    """Return the keys and labels of one slice's images."""
    return RealImages(**read_json(open_location(f"{output}/features"), _listed(kind, part, parts)))


@dataclass(frozen=True)
class PlainLatents:
    """A version of a functaset, and how many plain rows each shard of a split has."""

    functaset: Functaset
    counts: Mapping[str, tuple[int, ...]]

    def open(self, kind: str) -> PlainRows:
        """Return a reader of its own of a set of real images, which opens the shards that are read."""
        return PlainRows(self.functaset, SPLITS[kind], self.counts[SPLITS[kind]])


@lru_cache(maxsize=1)
def plain_latents(output: str, functaset: str) -> PlainLatents:
    """Return the latents of a run's features, opened once for all slices that this process computes."""
    listed = read_json(open_location(f"{output}/features"), LATENTS, MAX_STAGE_BYTES)
    counts = {split: tuple(each) for split, each in listed["counts"].items()}
    return PlainLatents(Functaset.open(functaset, listed["version"]), counts)


def is_input(key: str) -> bool:
    """Return whether an object of a run's folder is one of these."""
    listed = tuple(f"features/{kind}-" for kind in SPLITS)
    return key == f"features/{LATENTS}" or (key.startswith(listed) and key.endswith(".json"))


def _listed(kind: str, part: int, parts: int) -> str:
    return f"{kind}-{part:04d}-{parts:04d}.json"
