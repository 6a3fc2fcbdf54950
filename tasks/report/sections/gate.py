"""Quality gate: each threshold that the config sets beside the figure that it asks for."""

from functa.tasks.evaluation.gate import verdicts
from functa.tasks.report.blocks import ReportData, Section, Table


def section(data: ReportData) -> Section | None:
    """Show the verdict; absent where the config sets no threshold."""
    found = verdicts(data.config.get("gate") or {}, data.metrics)
    if not found:
        return None
    failed = sum(not verdict.passed for verdict in found)
    about = "Passed." if not failed else f"Failed: {failed} of {len(found)} thresholds are missed."
    rows = tuple(
        (
            "passed" if verdict.passed else "FAILED",
            verdict.figure,
            "not measured" if verdict.measured is None else f"{verdict.measured:.4g}{verdict.unit}",
            f"{'at least' if verdict.key.startswith('min_') else 'at most'} {verdict.threshold:g}{verdict.unit}",
            f"gate.{verdict.key}",
        )
        for verdict in found
    )
    columns = ("verdict", "figure", "measured", "asked for", "key")
    return Section("gate", "Quality gate", about, (Table("gate", "Thresholds", columns, rows),))
