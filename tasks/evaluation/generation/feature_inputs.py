"""Inputs of feature slices, listed once for all of them: keys of training images, and rows of the functaset's shards.

features/latents.json              version of the functaset, and how many rows without augmentation each shard has
features/reference-0003-0257.json  the keys of one slice's training images
"""

from dataclasses import dataclass
from functools import lru_cache

from functa.storage.functaset.functaset import Functaset
from functa.storage.images.source import Images
from functa.storage.places.address import MAX_STAGE_BYTES, open_location, read_json, write_json
from functa.tasks.inputs.latents import PlainRows, plain_counts

LATENTS = "latents.json"


def write_inputs(output: str, images: Images, functaset: str, parts: int) -> None:
    """Write the inputs of the features in a run's folder; the reference is computed in so many slices."""
    location, opened = open_location(f"{output}/features"), Functaset.open(functaset)
    counts = plain_counts(opened, "train")
    write_json(location, LATENTS, {"version": opened.version, "counts": counts}, MAX_STAGE_BYTES)
    keys = images.split("train").keys
    for part in range(parts):
        rows = slice(len(keys) * part // parts, len(keys) * (part + 1) // parts)
        write_json(location, _keys_name(part, parts), list(keys[rows]))


def read_keys(output: str, part: int, parts: int) -> list[str]:
    """Return the keys of one slice's training images."""
    keys: list[str] = read_json(open_location(f"{output}/features"), _keys_name(part, parts))
    return keys


@dataclass(frozen=True)
class TrainingRows:
    """A version of a functaset, and how many plain rows each shard of its training split has."""

    functaset: Functaset
    counts: tuple[int, ...]

    def open(self) -> PlainRows:
        """Return a reader of its own, which opens the shards that are read."""
        return PlainRows(self.functaset, "train", self.counts)


@lru_cache(maxsize=1)
def training_rows(output: str, functaset: str) -> TrainingRows:
    """Return the latents of a run's features, opened once for all slices that this process computes."""
    listed = read_json(open_location(f"{output}/features"), LATENTS, MAX_STAGE_BYTES)
    return TrainingRows(Functaset.open(functaset, listed["version"]), tuple(listed["counts"]))


def is_input(key: str) -> bool:
    """Return whether an object of a run's folder is one of these."""
    return key == f"features/{LATENTS}" or (key.startswith("features/reference-") and key.endswith(".json"))


def _keys_name(part: int, parts: int) -> str:
    return f"reference-{part:04d}-{parts:04d}.json"
