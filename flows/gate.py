"""The quality gate of a finished run: checked after evaluation, and again when a run has nothing to do."""

import json

from functa.flows.ledger import Ledger
from functa.storage.errors import FunctaError
from functa.storage.places.address import open_location
from functa.tasks.evaluation.gate import verdicts
from functa.tasks.stage_table import STAGES


class GateFailed(FunctaError):
    """A figure misses the threshold that the config sets: the run fails, its stages remain finished."""


def check_gate(ledger: Ledger) -> None:
    """Raise GateFailed, naming each figure, its threshold and the report.

    The report shows the verdict of the latest gate: it is written again if the gate has changed since. No stage is run
    again.
    """
    record = ledger.require("evaluate")
    gate = ledger.config.gate.model_dump(mode="json")
    _show_in_report(ledger, ledger.output(record), gate)
    broken = [verdict.explain() for verdict in verdicts(gate, record.figures) if not verdict.passed]
    if broken:
        raise GateFailed(f"{'; '.join(broken)}; report: {ledger.location.uri}/report.html")


def _show_in_report(ledger: Ledger, run: str, gate: dict[str, float | None]) -> None:
    before = json.loads(open_location(run).read("run.json"))["config"].get("gate") or {}
    if _thresholds(before) == _thresholds(gate):
        return
    from functa.flows.jobs import pixel_classifier_location
    from functa.tasks.report.run_folder import load_folder, write_run

    folder = load_folder(run)
    records = {stage: ledger.up_to_date(stage) for stage in folder.outputs if stage in STAGES}
    outputs = {stage: ledger.output(record) for stage, record in records.items() if record is not None}
    outputs["pixel_classifier"] = pixel_classifier_location(ledger)
    # Their present locations: a root may have been moved or copied since its run was described.
    places = {"root": ledger.root, "run": run, "outputs": outputs}
    write_run(folder.model_copy(update=places | {"config": folder.config | {"gate": gate}}))


def _thresholds(gate: dict[str, float | None]) -> dict[str, float]:
    return {key: value for key, value in gate.items() if value is not None}
