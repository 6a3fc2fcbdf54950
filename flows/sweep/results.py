"""Collect the results of a sweep's members: sweep.json after each of them, table and report at the end."""

import json
import threading
from dataclasses import asdict
from typing import Any

from functa.flows.config.schema import ConfigError
from functa.flows.ledger import Ledger, now
from functa.flows.sweep.plan import Member, SweepPlan, number_of
from functa.flows.sweep.shared import shared_folder
from functa.storage.errors import DamagedObject, FunctaError
from functa.storage.places.address import MAX_STAGE_BYTES, open_location, read_json
from functa.storage.places.location import Location
from functa.storage.places.reused import refuse_link_out
from functa.storage.runs.stage_records import StageConflict, read_record
from functa.tasks.evaluation.gate import measured
from functa.tasks.report.compare.sweep import Sweep, SweepMember, splits, unknown_metric, unmeasured


class SweepFailed(FunctaError):
    """Some members of a sweep failed; the others have finished."""


class SweepState:
    """The state of every member, written to sweep.json whenever one has ended, for when the sweep is interrupted.

    Raises ConfigError for a metric that no run measures, StageConflict if the root holds results of another sweep,
    StorageError where a link would lead a member out of the root.
    """

    def __init__(self, plan: SweepPlan, root: str, metrics: list[str], command: str) -> None:
        self.plan, self.root, self.command = plan, root, command
        self.metrics = tuple(dict.fromkeys(metrics))
        _refuse([unknown_metric(metric) for metric in self.metrics])
        _check_same_sweep(plan, open_location(root))
        shared = [shared_folder(stage, name) for stage, name, _ in plan.shared()]
        for folder in (*(member.folder for member in plan.members), *shared):
            refuse_link_out(open_location(root), folder)
        self.failed: dict[Member, str] = {}
        self._finished: dict[Member, tuple[dict[str, Any], str]] = {}
        self._up_to_date: dict[Member, bool] = {}
        self._lock = threading.Lock()

    def root_of(self, member: Member) -> str:
        """Return the member's root."""
        return f"{self.root.rstrip('/')}/{member.folder}"

    def is_finished(self, member: Member) -> bool:
        """Return whether the member was up to date at the first call, or has finished since."""
        if member not in self._up_to_date:
            root = self.root_of(member)
            begun = read_record(open_location(root), "evaluate") is not None
            self._up_to_date[member] = begun and Ledger(member.config, root).all_up_to_date()
        return self._up_to_date[member] or member in self._finished

    def finish(self, member: Member) -> None:
        """Note a member's figures and write sweep.json."""
        self.note(member)
        with self._lock:
            self._write()

    def note(self, member: Member) -> None:
        """Note a member's figures and write nothing."""
        ledger = Ledger(member.config, self.root_of(member))
        record = ledger.require("evaluate")
        with self._lock:
            self._finished[member] = record.figures, ledger.output(record)

    def refuse_unmeasured(self) -> None:
        """Raise ConfigError for a metric that no finished member has; some may lack it by their settings."""
        found = [metrics for metrics, _ in self._finished.values()]
        _refuse([unmeasured(metric, found) for metric in self.metrics] if found else [])

    def fail(self, member: Member, error: str) -> None:
        """Note that a member failed, and write sweep.json."""
        with self._lock:
            self.failed[member] = error
            self._write()

    def first_finished(self) -> str | None:
        """Return a finished member's root: what has no stage record is reused from it, such as the pixel classifier."""
        return next((self.root_of(member) for member in list(self._finished)), None)

    def figures(self, member: Member) -> str:
        """Return a text of a finished member's metrics."""
        found = [(metric, measured(self._finished[member][0], metric)) for metric in self.metrics]
        return ", ".join(f"{metric} {'not measured' if value is None else f'{value:.4g}'}" for metric, value in found)

    def sweep(self) -> Sweep:
        """Return the sweep as its report needs it."""
        members = tuple(self._described(member) for member in self.plan.members)
        axes = tuple(axis.name for axis in self.plan.axes)
        return Sweep(self.plan.preset, axes, self.metrics, members, self.plan.seeded, self.command, now())

    def _described(self, member: Member) -> SweepMember:
        root = open_location(self.root_of(member)).uri
        if member in self._finished:
            metrics, run = self._finished[member]
            return SweepMember(member.name, member.values, member.seed, root, "finished", "", metrics, run)
        error = self.failed.get(member, "")
        return SweepMember(member.name, member.values, member.seed, root, "failed" if error else "waiting", error)

    def as_json(self) -> dict[str, Any]:
        """Return what sweep.json holds: members, settings with mean and sd, splits, the common config."""
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
        """Raise SweepFailed, naming each member that failed and why."""
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
    """Raise StageConflict if results of a sweep over other keys or of another config would be replaced.

    Values, seeds and metrics may differ: that continues the same sweep.
    """
    before = _earlier_results(root)
    if before is None:
        return
    keys = sorted(key for name in before["over"] for key in name.split(", "))
    old = {"preset": before["preset"], "--over": " and ".join(keys), **before["base"]}
    new = {"preset": plan.preset, "--over": " and ".join(plan.keys), **plan.base}
    if keys != plan.keys:  # then the common config differs by the same keys, which adds nothing
        old, new = ({name: each[name] for name in ("preset", "--over")} for each in (old, new))
    names = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
    if not names:
        return
    changes = ", ".join(f"{name}: {old.get(name)!r} -> {new.get(name)!r}" for name in names[:6])
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    reuse = f", with --from {root.uri} to take over what still fits" if root.list("shared/") else ""
    raise StageConflict(f"{root.uri} holds another sweep ({changes}{more}): choose another --root{reuse}")


def _earlier_results(root: Location) -> dict[str, Any] | None:
    """Return sweep.json if it is worth keeping: a sweep without a finished member may be replaced."""
    if not root.exists("sweep.json"):
        return None
    try:
        found = read_json(root, "sweep.json", MAX_STAGE_BYTES)
        worth = any(member["state"] == "finished" for member in found["members"])
        return found if worth and isinstance(found["base"], dict) and "preset" in found and "over" in found else None
    except (DamagedObject, KeyError, TypeError):
        return None  # damaged, or of a version that did not record the config


def write_results(state: SweepState) -> dict[str, Any]:
    """Write sweep.json, sweep.csv, images/ and report.html; return what sweep.json holds."""
    from functa.tasks.evaluation.evaluator_input import read_arrays
    from functa.tasks.report.compare.sweep_page import write_sweep

    root = open_location(state.root)
    write_sweep(state.sweep(), root, number_of, lambda run: read_arrays(run, "samples"))
    results = state.as_json()
    root.write("sweep.json", json.dumps(results, indent=1).encode())
    return results
