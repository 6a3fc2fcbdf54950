"""Samples of the diffusion model, large."""

from functa.tasks.report.blocks import Pictures, ReportData, Section, Sheet
from functa.tasks.report.words import number, show


def section(data: ReportData) -> Section | None:
    """Show the samples that the evaluation kept, in the order drawn."""
    if data.samples is None or not len(data.samples):
        return None
    labels = tuple(str(label) for label in data.sample_labels or ())
    drawn = number(data.metrics, "fd_reference", "samples")
    count = f"{len(data.samples):,} of {drawn:,.0f} samples" if drawn else f"{len(data.samples):,} samples"
    about = f"{count} of the diffusion model, evenly spaced in the order drawn, not chosen."
    if labels:
        about += " Below each: the class it was drawn for."
    how = data.metrics.get("sampling")
    if isinstance(how, dict):
        about += f" Drawn by {how.get('sampler')} in {how.get('sampling_steps')} steps"
        about += f" at guidance {show(how.get('guidance'))}."
    sheet = Sheet("samples", "", (Pictures("sample", data.samples, labels),))
    return Section("samples", "Samples", about, (sheet,))
