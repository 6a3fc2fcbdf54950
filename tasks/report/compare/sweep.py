"""Results of a sweep: members' figures, mean and sd of each setting, and on which images they were measured."""

import difflib
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from functa.tasks.evaluation.catalogue import BY_SPACE, SPACES, catalogue, described
from functa.tasks.evaluation.gate import measured


@dataclass(frozen=True)
class SweepMember:
    """One run of the sweep; `metrics` is its metrics.json, empty where it has not finished."""

    name: str
    values: tuple[str, ...]  # one for each axis
    seed: int | None
    root: str
    state: str  # finished, failed or waiting
    error: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    run: str = ""  # URI of its run's folder


@dataclass(frozen=True)
class Summary:
    """A metric over the seeds of one setting. sd is that of a sample, with n - 1; None for a single value."""

    mean: float
    sd: float | None
    values: tuple[float, ...]


@dataclass(frozen=True)
class Setting:
    """The members that differ by their seed alone."""

    values: tuple[str, ...]
    members: tuple[SweepMember, ...]
    summaries: dict[str, Summary]  # of the metrics that were measured


@dataclass(frozen=True)
class Sweep:
    """Everything that a sweep's table, plot and report are made from."""

    preset: str
    axes: tuple[str, ...]
    metrics: tuple[str, ...]
    members: tuple[SweepMember, ...]
    seeded: str = ""  # config key that the seeds count up
    command: str = ""
    created: str = ""

    @property
    def settings(self) -> list[Setting]:
        """Return the settings in the order of the members."""
        groups: dict[tuple[str, ...], list[SweepMember]] = {}
        for member in self.members:
            groups.setdefault(member.values, []).append(member)
        return [Setting(values, tuple(members), summarise(members, self.metrics)) for values, members in groups.items()]


def summarise(members: list[SweepMember], metrics: tuple[str, ...]) -> dict[str, Summary]:
    """Return mean and sd of each metric over the members that have it."""
    found = {}
    for metric in metrics:
        values = [value for member in members if (value := measured(member.metrics, metric)) is not None]
        if values:
            sd = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None
            found[metric] = Summary(sum(values) / len(values), sd, tuple(values))
    return found


def names_of(metrics: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted names of every number in metrics.json."""
    names: list[str] = []
    for key, value in metrics.items():
        if isinstance(value, dict):
            names += names_of(value, f"{prefix}{key}.")
        elif measured({"": value}, "") is not None:
            names.append(f"{prefix}{key}")
    return names


def unknown_metric(metric: str) -> str:
    """Explain what is wrong with a name that no run measures, with near names; "" where some run may measure it."""
    first, dot, below = metric.partition(".")
    known = catalogue()
    if first in known and (first not in BY_SPACE or not dot or below in SPACES):
        return ""
    if first in known:
        spaces = [f"{first}.{space}" for space in SPACES]
        near = difflib.get_close_matches(metric, spaces, n=3, cutoff=0.6)
        return f"--metric {metric}: no run measures that; {_meant(near, spaces)}"
    near = [f"{name}{dot}{below}" for name in difflib.get_close_matches(first, known, n=3, cutoff=0.6)]
    return f"--metric {metric}: no run measures that; {_meant(near, list(known))}"


def unmeasured(metric: str, metrics: Sequence[dict[str, Any]]) -> str:
    """Explain what is wrong with a metric that no run measured, with near names; "" where one did."""
    known = list(dict.fromkeys(name for each in metrics for name in names_of(each)))
    if metric in known:
        return ""
    beside = [name for name in known if name.partition(".")[0] == metric.partition(".")[0]]
    below = [name for name in beside if name.startswith(f"{metric}.")]
    near = below or difflib.get_close_matches(metric, beside, n=3, cutoff=0.4)
    meant = _meant(near, beside) if beside else "their config asks for none; name a figure of a member's metrics.json"
    return f"--metric {metric}: no member measured such a number; {meant}"


def _meant(near: list[str], known: list[str]) -> str:
    return f"did you mean {' or '.join(near[:3])}?" if near else f"known: {', '.join(known)}"


def splits(sweep: Sweep) -> dict[str, str]:
    """Return for each metric on which images it was measured, according to a member that has it."""
    found = {}
    for metric in sweep.metrics:
        having = (each.metrics for each in sweep.members if measured(each.metrics, metric) is not None)
        found[metric] = split_of(metric, next(having, {}))
    return found


def split_of(metric: str, metrics: dict[str, Any]) -> str:
    """Write on which images a metric was measured, and on which a choice made by it is then made."""
    parts = metric.split(".")
    measured_on = described(parts[0]).split
    if measured_on == "samples":
        reference = metrics.get("fd_reference")
        split = reference.get("images", "train") if isinstance(reference, dict) else "train"
        if split != "test":
            return f"{metric} compares with the training split: a setting chosen by it is not chosen on test images."
        return f"{metric} compares with the test split: a setting chosen by it is chosen on test."
    if measured_on == "train" or "train" in parts:
        return f"{metric} is of the training split: a setting chosen by it is not chosen on test images."
    if measured_on == "test":
        return f"{metric} is of the test split: a setting chosen by it is chosen on test."
    return f"{metric}: it is not known on which split it was measured, nor on which a choice by it is made."


def best(settings: list[Setting], metric: str) -> Setting | None:
    """Return the setting of best mean; None where it is not known which end is better, or all are equal."""
    better = described(metric.partition(".")[0]).better
    having = [each for each in settings if metric in each.summaries and math.isfinite(each.summaries[metric].mean)]
    if not better or len({each.summaries[metric].mean for each in having}) < 2:
        return None
    choose = max if better == "higher" else min
    return choose(having, key=lambda each: each.summaries[metric].mean)
