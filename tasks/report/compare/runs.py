"""Compare several runs: their figures, their training curves, the config keys in which they differ."""

import json
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from functa.storage.errors import StorageError
from functa.storage.places.address import open_location
from functa.storage.places.location import Location
from functa.storage.places.reused import NotReused, output_of
from functa.storage.runs.curve import read_curve, whole
from functa.storage.runs.stage_records import output_location, read_record
from functa.tasks.evaluation.catalogue import described, groups
from functa.tasks.evaluation.gate import measured
from functa.tasks.report.words import Figure, figures, flattened
from functa.tasks.stage_table import STAGES

Row = dict[str, Any]

BEST, ABSENT = "\u2605", "\u2013"

OTHER_IMAGES = "The runs have different images: their figures cannot be compared, and no value is marked as the best."

HEADLINE = ("psnr_test", "top1_test", "fid", "fd", "bits_per_dim", "memorized_share")  # in this order


@dataclass(frozen=True)
class ComparedRun:
    """One run: its name, root and date, its figures, config and training curves, the digest of its images."""

    name: str
    root: str
    created: str
    metrics: dict[str, Any]
    config: dict[str, Any]
    curves: dict[str, list[Row]]
    images: str = ""
    """Digest of the images of both splits; "" where it was not recorded."""


@dataclass(frozen=True)
class Line:
    """One figure of all runs; None where a run has not measured it."""

    key: str
    group: str
    name: str
    shown: tuple[str | None, ...]
    values: tuple[float | None, ...]
    better: str
    """Which end is better: higher, lower, or "" where neither is."""

    @property
    def differs(self) -> bool:
        """Return whether the runs show different values."""
        return len(set(self.shown)) > 1

    @property
    def headline(self) -> bool:
        """Return whether this is one of the figures that a reader looks for first."""
        return self.key.partition(".")[0] in HEADLINE

    @property
    def best(self) -> tuple[int, ...]:
        """Return the numbers of the runs that are best at it; none where no end is better or all are equal."""
        known = [value for value in self.values if value is not None]
        if not self.better or not self.differs or len(known) < 2:
            return ()
        best = max(known) if self.better == "higher" else min(known)
        return tuple(index for index, value in enumerate(self.values) if value == best)

    @property
    def cells(self) -> tuple[str, ...]:
        """Return each run's value, the best ones marked."""
        best = self.best
        marked = (f"{value} {BEST}" if index in best else value for index, value in enumerate(self.shown))
        return tuple(ABSENT if value is None else value for value in marked)


@dataclass(frozen=True)
class Comparison:
    """Several runs, the headline figures first.

    `settings` are the config keys that differ, with each run's value (None: it has no such key).
    """

    runs: tuple[ComparedRun, ...]
    lines: tuple[Line, ...]
    settings: dict[str, tuple[Any, ...]]
    same_images: bool = True

    def as_json(self) -> dict[str, Any]:
        """Return {runs[], same_images, metrics{key: [value of each run]}, differing[], config{key: [...]}}."""
        values = [dict(flattened(run.metrics)) for run in self.runs]
        return {
            "runs": [{"name": run.name, "root": run.root, "created": run.created} for run in self.runs],
            "same_images": self.same_images,
            "metrics": {line.key: [each.get(line.key) for each in values] for line in self.lines},
            "differing": [line.key for line in self.lines if line.differs],
            "config": {key: list(value) for key, value in self.settings.items()},
        }


def read_runs(addresses: list[str]) -> tuple[ComparedRun, ...]:
    """Read runs, each from a root or its folder runs/<id>. Raises StorageError where there are no metrics."""
    found = [_read(open_location(location), location) for location in addresses]
    for key in (lambda run: run.name, lambda run: run.root.rstrip("/").rpartition("/")[2]):
        names = [key(run) for run in found]
        if len(set(names)) == len(names):
            break
    else:
        names = [f"{number}: {location}" for number, location in enumerate(addresses, 1)]
    return tuple(replace(run, name=name) for name, run in zip(names, found))


def _read(location: Location, given: str) -> ComparedRun:
    if not location.exists("metrics.json"):
        raise StorageError(
            f"{given}: has no metrics.json, so no run was measured there; name a run's root, or run `functa evaluate` "
            "with it as --root first"
        )
    try:
        metrics = json.loads(location.read("metrics.json"), parse_int=whole)
        about = json.loads(_described(location).read("run.json"))
        config, created = dict(about["config"]), str(about["created"])
        if not isinstance(metrics, dict):
            raise ValueError("metrics.json is no object")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(
            f"{given}: its metrics.json or run.json cannot be read ({error}); run evaluate again"
        ) from None
    name = str(config.get("name", given))
    curves, images = _curves(location, about.get("outputs", {})), str(about.get("images_digest") or "")
    return ComparedRun(name, location.uri, created, metrics, config, curves, images)


def _described(location: Location) -> Location:
    """Return the folder that holds run.json: the location itself, or that of the root's latest run."""
    if location.exists("run.json"):
        return location
    record = read_record(location, "evaluate")
    if record is None:
        raise ValueError("no record of an evaluation")
    return output_location(record, location)


def _curves(location: Location, outputs: dict[str, str]) -> dict[str, list[Row]]:
    """Read curves by stage. A root's own records come first: it may have been moved since its run was described."""
    curves = {}
    root = open_location(location.uri.rpartition("/runs/")[0] or location.uri)
    for stage in (stage.name for stage in STAGES.values() if stage.trains):
        record = read_record(location, stage)
        if record is None and stage not in outputs:
            continue
        with suppress(NotReused):  # of a copied run, or a stranger's: a curve less
            output = output_of(root, str(outputs[stage])) if record is None else output_location(record, location)
            if rows := read_curve(output):
                curves[stage] = rows
    return curves


def compare_runs(runs: tuple[ComparedRun, ...]) -> Comparison:
    """Compare the figures, headline first, then those that differ, by group; and the configs.

    No figure has a better end where the runs' images are not the same: their files, or the pixels made of them.
    """
    same_images = len({run.images for run in runs if run.images}) < 2 and len({_pixels(run) for run in runs}) < 2
    shown: list[dict[str, Figure]] = [{figure.key: figure for figure in figures(run.metrics)} for run in runs]
    lines = [
        Line(
            key, figure.group, figure.name, tuple(each[key].value if key in each else None for each in shown),
            tuple(measured(run.metrics, key) for run in runs),
            described(key.partition(".")[0]).better if same_images else "",
        )
        for key, figure in {key: figure for each in shown for key, figure in each.items()}.items()
    ]  # fmt: skip
    configs = [dict(flattened(run.config)) for run in runs]
    left_out = ("name", "provenance", "paper")
    keys = dict.fromkeys(key for each in configs for key in each if key.partition(".")[0] not in left_out)
    settings = {key: tuple(each.get(key) for each in configs) for key in keys}
    return Comparison(
        runs,
        tuple(sorted(lines, key=_rank)),  # stable: the file's order within a group
        {key: values for key, values in settings.items() if _differ(values)},
        same_images,
    )


def _pixels(run: ComparedRun) -> tuple[Any, ...]:
    """Return the settings by which pixels are made of an image's file."""
    images = run.config.get("images") or {}
    return tuple(images.get(key) for key in ("resolution", "channels"))


def _differ(values: tuple[Any, ...]) -> bool:
    """Return whether settings differ; a key that a run's version did not have is equal to one that is switched off."""
    return any(value != values[0] for value in values) and any(values)


def _rank(line: Line) -> tuple[int, int, int]:
    first = line.key.partition(".")[0]
    order = HEADLINE.index(first) if line.headline else len(HEADLINE)
    return order, not line.differs, groups().index(line.group)
