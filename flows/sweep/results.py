"""What has come of a sweep's members so far: sweep.json after each of them, table and report at the end."""

import json
import threading
from dataclasses import asdict
from typing import Any

from functa.flows.config.schema import ConfigError
from functa.flows.ledger import Ledger, now
from functa.flows.sweep.plan import Member, SweepPlan, number_of
from functa.storage.errors import DamagedObject, FunctaError
from functa.storage.places.address import open_location, read_json
from functa.storage.places.location import Location
from functa.storage.runs.stage_records import StageConflict, read_record
from functa.tasks.evaluation.gate import measured
from functa.tasks.report.compare.sweep import Sweep, SweepMember, splits, unknown_metric, unmeasured


class SweepFailed(FunctaError):
    """Members of a sweep failed; the others stand."""


class SweepTold:
    """The state of every member, written down whenever one has ended: an interrupted sweep tells what it has.

    Raises ConfigError for a metric that no run measures, StageConflict where the root holds what another sweep found.
    """

    def __init__(self, plan: SweepPlan, root: str, metrics: list[str], command: str) -> None:
        self.plan, self.root, self.command = plan, root, command
        self.metrics = tuple(dict.fromkeys(metrics))
        _refuse([unknown_metric(metric) for metric in self.metrics])
        _check_same_sweep(plan, open_location(root))
        self.failed: dict[Member, str] = {}
        self._finished: dict[Member, tuple[dict[str, Any], str]] = {}
        self._stood: dict[Member, bool] = {}
        self._lock = threading.Lock()

    def root_of(self, member: Member) -> str:
        """The member's root."""
        return f"{self.root.rstrip('/')}/{member.folder}"

    def stands(self, member: Member) -> bool:
        """Whether all of the member stood when it was asked first, or has finished since."""
        if member not in self._stood:
            root = self.root_of(member)
            begun = read_record(open_location(root), "evaluate") is not None
            self._stood[member] = begun and Ledger(member.config, root).all_standing()
        return self._stood[member] or member in self._finished

    def finish(self, member: Member) -> None:
        """Notes a member's figures."""
        self.note(member)
        with self._lock:
            self._write()

    def note(self, member: Member) -> None:
        """Notes a member's figures and writes nothing."""
        ledger = Ledger(member.config, self.root_of(member))
        record = ledger.require("evaluate")
        with self._lock:
            self._finished[member] = record.figures, ledger.output(record)

    def refuse_unmeasured(self) -> None:
        """Raises ConfigError for a metric that no member has which finished; some may lack it by their settings."""
        found = [metrics for metrics, _ in self._finished.values()]
        _refuse([unmeasured(metric, found) for metric in self.metrics] if found else [])

    def fail(self, member: Member, error: str) -> None:
        """Notes that a member failed."""
        with self._lock:
            self.failed[member] = error
            self._write()

    def first_finished(self) -> str | None:
        """Root of a member that has finished: it lends what no stage record tells of, such as the pixel classifier."""
        return next((self.root_of(member) for member in list(self._finished)), None)

    def figures(self, member: Member) -> str:
        """The metrics of a finished member, in words."""
        found = [(metric, measured(self._finished[member][0], metric)) for metric in self.metrics]
        return ", ".join(f"{metric} {'not measured' if value is None else f'{value:.4g}'}" for metric, value in found)

    def sweep(self) -> Sweep:
        """As its report is made from."""
        members = tuple(self._told(member) for member in self.plan.members)
        axes = tuple(axis.name for axis in self.plan.axes)
        return Sweep(self.plan.preset, axes, self.metrics, members, self.plan.seeded, self.command, now())

    def _told(self, member: Member) -> SweepMember:
        root = open_location(self.root_of(member)).uri
        if member in self._finished:
            metrics, run = self._finished[member]
            return SweepMember(member.name, member.values, member.seed, root, "finished", "", metrics, run)
        error = self.failed.get(member, "")
        return SweepMember(member.name, member.values, member.seed, root, "failed" if error else "waiting", error)

    def as_json(self) -> dict[str, Any]:
        """sweep.json: members with the metrics asked for, settings with mean and sd, splits, the common config."""
        sweep = self.sweep()
        return {
            "preset": sweep.preset,
            "over": {axis.name: [", ".join(value) for value in axis.values] for axis in self.plan.axes},
            "seeded": sweep.seeded,
            "metrics": list(sweep.metrics),
            "splits": splits(sweep),
            "settings": [
                {"values": dict(zip(sweep.axes, setting.values)),
                 "metrics": {metric: asdict(summary) for metric, summary in setting.summaries.items()}}
                for setting in sweep.settings
            ],
            "members": [
                {"name": each.name, "values": dict(zip(sweep.axes, each.values)), "seed": each.seed,
                 "state": each.state, "error": each.error, "root": each.root,
                 "metrics": {metric: measured(each.metrics, metric) for metric in sweep.metrics}}
                for each in sweep.members
            ],
            "base": self.plan.base, "command": sweep.command, "created": sweep.created,
        }  # fmt: skip

    def _write(self) -> None:
        open_location(self.root).write("sweep.json", json.dumps(self.as_json(), indent=1).encode())

    def raise_failed(self) -> None:
        """Raises SweepFailed, naming each member that failed and why."""
        if not self.failed:
            return
        named = "; ".join(f"{member.name}: {error}" for member, error in list(self.failed.items())[:5])
        more = f"; and {len(self.failed) - 5} more" if len(self.failed) > 5 else ""
        raise SweepFailed(
            f"{len(self.failed)} of {len(self.plan.members)} members failed ({named}{more}); the same command tries "
            f"them again; report: {open_location(self.root).uri}/report.html"
        )


def _refuse(faults: list[str]) -> None:
    for fault in faults:
        if fault:
            raise ConfigError(fault)


def _check_same_sweep(plan: SweepPlan, root: Location) -> None:
    """Raises StageConflict where table and report of a sweep over other keys or of another config would be replaced.

    Values, seeds and metrics may be others: the same sweep goes on.
    """
    before = _told_before(root)
    if before is None:
        return
    keys = sorted(key for name in before["over"] for key in name.split(", "))
    old = {"preset": before["preset"], "--over": " and ".join(keys), **before["base"]}
    new = {"preset": plan.preset, "--over": " and ".join(plan.keys), **plan.base}
    if keys != plan.keys:  # then what they have in common differs by these keys too, which says nothing more
        old, new = ({name: each[name] for name in ("preset", "--over")} for each in (old, new))
    names = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
    if not names:
        return
    changes = ", ".join(f"{name}: {old.get(name)!r} -> {new.get(name)!r}" for name in names[:6])
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    lent = f", with --from {root.uri} to take over what still fits" if root.list("shared/") else ""
    raise StageConflict(f"{root.uri} holds another sweep ({changes}{more}): choose another --root{lent}")


def _told_before(root: Location) -> dict[str, Any] | None:
    """What sweep.json tells, if that would be a loss: nothing has finished in what failed, and it may be mended."""
    if not root.exists("sweep.json"):
        return None
    try:
        told = read_json(root, "sweep.json")
        worth = any(member["state"] == "finished" for member in told["members"])
        return told if worth and isinstance(told["base"], dict) and "preset" in told and "over" in told else None
    except (DamagedObject, KeyError, TypeError):
        return None  # garbled, or of a time when it did not tell what it was made of


def write_results(told: SweepTold) -> dict[str, Any]:
    """sweep.json, sweep.csv, images/ and report.html; returns what sweep.json holds."""
    from functa.tasks.evaluation.bench import read_arrays
    from functa.tasks.report.compare.sweep_page import write_sweep

    place = open_location(told.root)
    write_sweep(told.sweep(), place, number_of, lambda run: read_arrays(run, "samples"))
    results = told.as_json()
    place.write("sweep.json", json.dumps(results, indent=1).encode())
    return results
