"""The files of an export: those of a root that others can use, those of a functaset or of a store of photographs.

An export opens as what it was made from: the copy of a root is a root. What only concerns the machine it was made on is
left out: optimiser states, processes, runs, and the folders above the images.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import yaml

from functa.storage.errors import StorageError
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.records import read_vouched
from functa.storage.places.address import MAX_STAGE_BYTES, open_location, readable
from functa.storage.places.location import Location
from functa.storage.publish.formats.table import check_installed, files_in_format
from functa.storage.publish.functaset_files import check_whole, functaset_files
from functa.storage.publish.manifest import MANIFEST, Kind, Layout, Manifest
from functa.storage.runs.curve import CURVE
from functa.storage.runs.stage_records import StageRecord, output_location, read_record
from functa.storage.runs.weights import SIDECAR, WEIGHTS, read_weights
from functa.tasks.inference.photographs.store import functasets_of_store, only_functaset
from functa.tasks.stage_output import stage_output
from functa.tasks.stage_table import STAGES

PICTURES = ("reconstructions.png", "samples.png")  # of the newest run, shown on the model card

FUNCTASET = STAGES["encode"].output

Read = Callable[[], bytes]


@dataclass(frozen=True)
class Contents:
    """The files of an export by their paths, read when they are written, and its functasets by their folders in it.

    layout: the format of its latents.
    """

    kind: Kind
    files: dict[str, Read]
    functasets: dict[str, Location] = field(default_factory=dict)
    layout: Layout | Literal["zarr"] = "zarr"


def contents_of(uri: str, data_only: bool = False) -> Contents:
    """Return the files of a root (data_only: of its functaset), a functaset or a store of photographs.

    Raises StorageError: none of these, or damaged.
    """
    location = open_location(uri)
    if _is_root(location):
        return _of_functaset(stage_output(location, "encode")) if data_only else _of_root(location)
    found = functasets_of_store(uri)
    if found:
        places = {each.rpartition("/")[2]: open_location(each) for each in found}
        return Contents("photographs", _of_functasets(places), places)
    return _of_functaset(location)


@contextmanager
def latents_of(uri: str, layout: Layout) -> Iterator[Contents]:
    """Give the latents of a root or a functaset in another format, until the block ends.

    Raises StorageError: a store of several functasets, a damaged one, a package that is not installed.
    """
    check_installed(layout)
    location = open_location(uri)
    location = stage_output(location, "encode") if _is_root(location) else open_location(only_functaset(uri))
    check_whole(location)
    with files_in_format(Functaset.open(location), layout) as files:
        yield Contents("latents", files, {"": location}, layout)


def _is_root(location: Location) -> bool:
    return any(read_record(location, stage) is not None for stage in STAGES)


def _of_functaset(location: Location) -> Contents:
    return Contents("functaset", _of_functasets({"": location}), {"": location})


def exported_again(location: Location, manifest: Manifest) -> Contents:
    """Return the files of a folder that is an export itself, each checked when it is read."""
    fix = f"or delete {location.uri}/{MANIFEST} to export what is there now"

    def read(path: str) -> bytes:
        try:
            return read_vouched(location, path, manifest.files[path])
        except StorageError as error:
            raise type(error)(f"{str(error).partition(';')[0]}; restore it from a copy, {fix}") from None

    return Contents(manifest.kind, {path: partial(read, path) for path in manifest.files})


def _of_functasets(places: dict[str, Location]) -> dict[str, Read]:
    files: dict[str, Read] = {}
    for folder, location in places.items():
        check_whole(location)
        below = f"{folder}/" if folder else ""
        files |= {f"{below}{key}": partial(location.read, key) for key in functaset_files(location)}
    return files


def _of_root(root: Location) -> Contents:
    records = {name: record for name in STAGES if (record := read_record(root, name)) and record.output_digest}
    trained = [name for name in records if STAGES[name].trains]
    if "meta_train" not in records:
        raise StorageError(f"{root.uri}: no field has been trained there; run `functa meta-train PRESET` first")
    files: dict[str, Read] = {}
    for stage in trained:
        files |= _of_training(records[stage], root)
    places = {FUNCTASET: output_location(records["encode"], root)} if "encode" in records else {}
    files |= _of_functasets(places)
    newest = max(records.values(), key=lambda record: record.started)
    config = _published(newest.pipeline)
    for name in (*trained, *(["encode"] if places else [])):
        record = _published_record(records[name], config)
        files[f"stages/{name}.json"] = partial(_json, record, f"{root.uri}/stages/{name}.json")
    files["config.yaml"] = lambda: yaml.safe_dump(config, sort_keys=False).encode()
    if root.exists("metrics.json"):
        files["metrics.json"] = partial(root.read, "metrics.json")
    if "evaluate" in records:
        run = output_location(records["evaluate"], root)
        files |= {f"images/{name}": partial(run.read, f"images/{name}") for name in PICTURES
                  if run.exists(f"images/{name}")}  # fmt: skip
    return Contents("root", files, places)


def _of_training(record: StageRecord, root: Location) -> dict[str, Read]:
    output, stage = output_location(record, root), STAGES[record.stage]
    weights = read_weights(output)
    if weights is None or weights.metadata.get("weights_digest") != record.output_digest:
        raise StorageError(
            f"{output.uri}/{SIDECAR}: are not the weights of the {stage.product} that its record names; "
            f"run `functa {stage.command}` again"
        )
    names = [*WEIGHTS, *([CURVE] if output.exists(CURVE) else [])]
    return {f"{stage.output}/{name}": partial(output.read, name) for name in names}


def _published_record(record: StageRecord, pipeline: dict[str, Any]) -> StageRecord:
    """Return a stage's record without the process and the folders of this machine.

    pipeline: of the newest record, whose settings are those that samples are drawn with.
    """
    update = {"pipeline": pipeline, "config": _published(record.config), "output": STAGES[record.stage].output,
              "state": "finished", "owner": "", "device": "", "flow_run": "", "error": ""}  # fmt: skip
    return record.model_copy(update=update)


PATHS = ("location", "labels", "weights")  # keys whose values are paths of this machine


def _published(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config, nested or flat, with the last part of each path, and without its dispatch to machines."""
    found = {key: value for key, value in config.items() if key != "dispatch"}
    for key, value in found.items():
        if isinstance(value, dict):
            found[key] = _published(value)
        elif key.rpartition(".")[2] in PATHS and isinstance(value, str):
            found[key] = value.rstrip("/").rpartition("/")[2]
    return found


def _json(record: StageRecord, name: str) -> bytes:
    data = json.dumps(record.model_dump(mode="json"), indent=1).encode() + b"\n"
    return readable(data, name, "lower images.max_bad_fraction", MAX_STAGE_BYTES)
