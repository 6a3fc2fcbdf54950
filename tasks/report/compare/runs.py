"""Several runs side by side: their figures, their training curves, the config keys in which they differ."""

import json
from dataclasses import dataclass
from typing import Any

from functa.storage.errors import StorageError
from functa.storage.places.address import open_location
from functa.storage.places.location import Location
from functa.storage.runs.stage_records import output_location, read_record
from functa.tasks.report.words import Figure, figures

Row = dict[str, Any]

# Stage -> what it left in the root, with its curve.
TRAININGS = ("meta_train", "train_classifier", "train_diffusion")


@dataclass(frozen=True)
class ComparedRun:
    """One run: as it is called, where it is, what it measured, how its trainings went, what it was made of."""

    name: str
    root: str
    created: str
    metrics: dict[str, Any]
    config: dict[str, Any]
    curves: dict[str, list[Row]]


@dataclass(frozen=True)
class Line:
    """One figure of all runs; None where a run has not measured it."""

    key: str
    group: str
    name: str
    shown: tuple[str | None, ...]

    @property
    def differs(self) -> bool:
        """Whether the runs show different values."""
        return len(set(self.shown)) > 1


@dataclass(frozen=True)
class Comparison:
    """Several runs; `settings` are the config keys that differ, with each run's value (None: it has no such key)."""

    runs: tuple[ComparedRun, ...]
    lines: tuple[Line, ...]
    settings: dict[str, tuple[Any, ...]]

    def as_json(self) -> dict[str, Any]:
        """{runs[], metrics{key: [value of each run]}, differing[], config{key: [...]}}."""
        values = [dict(flattened(run.metrics)) for run in self.runs]
        return {
            "runs": [{"name": run.name, "root": run.root, "created": run.created} for run in self.runs],
            "metrics": {line.key: [each.get(line.key) for each in values] for line in self.lines},
            "differing": [line.key for line in self.lines if line.differs],
            "config": {key: list(value) for key, value in self.settings.items()},
        }


def read_runs(places: list[str]) -> tuple[ComparedRun, ...]:
    """Each a root, or the folder runs/<id> of one. Raises StorageError for a place that holds no run's metrics."""
    found = [_read(open_location(place), place) for place in places]
    for key in (lambda run: run.name, lambda run: run.root.rstrip("/").rpartition("/")[2]):
        names = [key(run) for run in found]
        if len(set(names)) == len(names):
            break
    else:
        names = [f"{number}: {place}" for number, place in enumerate(places, 1)]
    return tuple(
        ComparedRun(name, run.root, run.created, run.metrics, run.config, run.curves) for name, run in zip(names, found)
    )


def _read(place: Location, given: str) -> ComparedRun:
    if not place.exists("metrics.json"):
        raise StorageError(
            f"{given}: has no metrics.json, so no run was measured there; name a run's root, or run `functa evaluate` "
            "with it as --root first"
        )
    try:
        metrics = json.loads(place.read("metrics.json"))
        about = json.loads(_described(place).read("run.json"))
        config, created = dict(about["config"]), str(about["created"])
        if not isinstance(metrics, dict):
            raise ValueError("metrics.json is no object")
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{given}: its metrics.json or run.json cannot be read ({error}); run evaluate again"
        ) from None
    name = str(config.get("name", given))
    return ComparedRun(name, place.uri, created, metrics, config, _curves(place, about.get("outputs", {})))


def _described(place: Location) -> Location:
    """The folder that holds run.json: the place itself, or that of the root's latest run."""
    if place.exists("run.json"):
        return place
    record = read_record(place, "evaluate")
    if record is None:
        raise ValueError("no record of an evaluation")
    return output_location(record, place)


def _curves(place: Location, outputs: dict[str, str]) -> dict[str, list[Row]]:
    """By stage. A root's own records are asked first: it may have been moved since its run was described."""
    curves = {}
    for stage in TRAININGS:
        record = read_record(place, stage)
        if record is None and stage not in outputs:
            continue
        output = open_location(outputs[stage]) if record is None else output_location(record, place)
        if output.exists("metrics.jsonl"):
            curves[stage] = [json.loads(line) for line in output.read("metrics.jsonl").decode().splitlines()]
    return curves


def compare_runs(runs: tuple[ComparedRun, ...]) -> Comparison:
    """Lines in the order of metrics.json, by group."""
    shown: list[dict[str, Figure]] = [{figure.key: figure for figure in figures(run.metrics)} for run in runs]
    known = {key: figure for each in shown for key, figure in each.items()}
    groups = list(dict.fromkeys(figure.group for figure in known.values()))
    lines = [
        Line(key, figure.group, figure.name, tuple(each[key].value if key in each else None for each in shown))
        for key, figure in known.items()
    ]
    configs = [dict(flattened(run.config)) for run in runs]
    keys = dict.fromkeys(key for each in configs for key in each if key.partition(".")[0] not in ("name", "provenance"))
    settings = {key: tuple(each.get(key) for each in configs) for key in keys}
    return Comparison(
        runs,
        tuple(sorted(lines, key=lambda line: groups.index(line.group))),
        {key: values for key, values in settings.items() if any(value != values[0] for value in values)},
    )


def flattened(section: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Every value below a section, by its dotted key."""
    found: list[tuple[str, Any]] = []
    for key, value in section.items():
        nested = isinstance(value, dict) and value
        found += flattened(value, f"{prefix}{key}.") if nested else [(f"{prefix}{key}", value)]
    return found
