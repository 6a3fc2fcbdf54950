"""Every figure of metrics.json with its meaning, by group; and the paper's figures beside the run's."""

from collections.abc import Mapping
from typing import Any

from functa.tasks.evaluation.catalogue import groups
from functa.tasks.report.blocks import ReportData, Section, Table
from functa.tasks.report.words import Figure, figures, number

# The figures of a preset's section `paper`: name and unit.
PAPER = {
    "psnr": ("PSNR, test", "dB"), "top1": ("Top-1, test", "%"), "fid_uncond": ("FID, unconditional", ""),
    "fid_cond": ("FID, conditional", ""),
}  # fmt: skip

NOT_MEASURED = "not measured"


def beside_the_paper(data: ReportData) -> Section | None:
    """Show the figures of the paper's row beside the run's; nothing where the preset belongs to no row."""
    found = data.config.get("paper")
    paper = {key: value for key, value in (found if isinstance(found, dict) else {}).items() if key in PAPER}
    rows = []
    for key, value in paper.items():
        (name, unit), ours = PAPER[key], measured_as(key, data.config, data.metrics)
        rows.append((name, *beside(float(value), ours, unit)))
    if not rows:
        return None
    about = "The row of the paper's tables that this preset belongs to. Nothing but FID is set beside the paper's FID."
    columns = ("Figure", "The paper", "This run", "Difference")
    return Section("paper", "Beside the paper", about, (Table("paper", "Figures", columns, tuple(rows)),))


def beside(paper: float | None, ours: float | None, unit: str) -> tuple[str, str, str]:
    """Write the paper's figure, ours, and the difference; "" for a figure that the paper has not."""
    end = f" {unit}" if unit else ""
    shown = "" if paper is None else f"{paper:.1f}{end}"
    if ours is None:
        return shown, NOT_MEASURED, ""
    form = ".2f" if unit else ".4g"
    return shown, f"{ours:{form}}{end}", "" if paper is None else f"{ours - paper:+{form}}{end}"


def measured_as(key: str, config: Mapping[str, Any], metrics: dict[str, Any]) -> float | None:
    """Return a run's value of one of the paper's figures, in the paper's unit; None where it was not measured.

    Top-1 is that of the best step, as in the paper. FID is that of samples with labels, or of those without.
    """
    if key == "psnr":
        return number(metrics, "psnr_test")
    if key == "top1":
        best = number(metrics, "top1_best")
        share = number(metrics, "top1_test") if best is None else best
        return None if share is None else 100 * share
    return number(metrics, "fid") if conditional(config) == (key == "fid_cond") else None


def conditional(config: Mapping[str, Any]) -> bool:
    """Return whether a run draws samples of classes."""
    process = (config.get("diffusion") or {}).get("process", {})
    return bool(process.get("conditional")) and process.get("guidance") != 0


def section(data: ReportData) -> Section | None:
    """Show a folded table for each group."""
    found = figures(data.metrics)
    if not found:
        return None
    about = (
        "Everything in metrics.json, by group: its name, its value, its key and what it means. "
        "A table that is wider than the page scrolls sideways."
    )
    tables = [_table(name, part) for name in groups() if (part := [each for each in found if each.group == name])]
    return Section("figures", "All figures", about, tuple(tables))


def _table(group: str, part: list[Figure]) -> Table:
    meanings = ["", *(figure.meaning for figure in part)]
    rows = tuple(
        (figure.name, figure.value, figure.key, "" if figure.meaning == before else figure.meaning)
        for figure, before in zip(part, meanings)  # one meaning for neighbours that share it
    )
    return Table("", group, ("figure", "value", "key", "meaning"), rows, folded=True)
