"""How far samples are from real images, space by space, with what the distances have to be judged against."""

from typing import Any

from functa.tasks.evaluation.catalogue import SPACES
from functa.tasks.report.blocks import ReportData, Section, Table
from functa.tasks.report.words import number, show

MEASURES = (
    "Fr\u00e9chet distance", "\u2026 of reconstructions (floor)", "\u2026 of noise latents (ceiling)",
    "Kernel distance", "Precision", "Recall", "Dimensions", "Compared one by one",
)  # fmt: skip

FID = "Inception features: FID"


def section(data: ReportData) -> Section | None:
    """A table of the feature spaces, and what a reader of it must know."""
    reference = data.metrics.get("fd_reference")
    if not isinstance(reference, dict):
        return None
    dimensions = reference.get("dimensions")
    spaces = list(dimensions) if isinstance(dimensions, dict) else []
    if not spaces:
        return None
    columns = [_column(data.metrics, str(space)) for space in spaces]
    rows = tuple(zip(("Features", *MEASURES), *columns, strict=True))  # measures below each other fit a phone
    said = [*_warnings(data.metrics, spaces), *_protocol(data.metrics)]
    note = "Lower distances and higher shares are better; every set is compared with training images. " + " ".join(said)
    table = Table("generation", "Samples against training images", rows[0], rows[1:], note.strip())
    return Section("generation", "Generation", _about(data.metrics), (table,))


def _about(metrics: dict[str, Any]) -> str:
    samples, count = number(metrics, "fd_reference", "samples"), number(metrics, "fd_reference", "count")
    if samples is None or count is None:
        return ""
    about = f"{samples:,.0f} samples and {count:,.0f} training images."
    drawn = metrics.get("sampling")
    if isinstance(drawn, dict):
        about += f" Drawn by {drawn.get('sampler')} in {drawn.get('sampling_steps')} steps"
        about += f" at guidance {show(drawn.get('guidance'))}."
    duplicates = number(metrics, "duplicates")
    if duplicates:
        about += f" {duplicates:,.0f} of the samples repeat another one pixel by pixel."
    return about


def _column(metrics: dict[str, Any], space: str) -> tuple[str, ...]:
    fid = space == "inception" and number(metrics, "fid") is not None
    keys = ("fid", "fid_reconstruction") if fid else ("fd", "fd_reconstruction")
    inner = None if fid else space
    values = [number(metrics, key, inner) for key in keys]
    values += [number(metrics, key, space) for key in ("fd_noise", "kd")]
    shares = [number(metrics, key, space) for key in ("precision", "recall")]
    counts = [metrics["fd_reference"].get(key) for key in ("dimensions", "subset")]
    shown = [number(inner, space) if isinstance(inner, dict) else None for inner in counts]
    return (
        FID if fid else SPACES.get(space, space),
        *("" if value is None else show(value) for value in values),
        *("" if share is None else show(share, "share") for share in shares),
        *("" if count is None else show(count, "count") for count in shown),
    )


def _warnings(metrics: dict[str, Any], spaces: list[str]) -> list[str]:
    """Distances that were not taken, and those whose covariance lacks full rank."""
    said, samples = [], number(metrics, "fd_reference", "samples") or 0
    for space in spaces:
        wide = number(metrics["fd_reference"]["dimensions"], space) or 0
        taken = number(metrics, "fd", space) is not None or (space == "inception" and "fid" in metrics)
        name, counts = SPACES.get(space, space), f"{samples:,.0f} samples, {wide:,.0f} dimensions"
        if not taken:
            why = "too few for a covariance" if samples <= wide else "too many for a covariance"
            said.append(f"No Fr\u00e9chet distance of {name}: {counts} are {why}.")
        elif samples <= wide:
            said.append(f"The distance of {name} is of covariances without full rank: {counts}.")
    if any(number(metrics, "kd", space) is not None for space in spaces):
        said.append(
            "Kernel distance (unbiased, so it may be negative), precision and recall (three nearest neighbours) "
            "compare single rows: the last line says how many of each set."
        )
    return said


def _protocol(metrics: dict[str, Any]) -> list[str]:
    for key, name in (("fid_protocol", "FID"), ("inception_protocol", "Inception features, not FID")):
        protocol = metrics.get(key)
        if isinstance(protocol, dict):
            weights, resize = str(protocol.get("weights", ""))[:16], protocol.get("resize", "")
            return [f"{name}: weights sha256 {weights}\u2026, {resize}, {protocol.get('batch', '')} images at a time."]
    return []
