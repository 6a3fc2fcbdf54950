"""The run's Prefect artifacts: metrics, lineage, reconstructions, samples, and where the report is."""

from prefect.artifacts import create_markdown_artifact, create_table_artifact

from tasks.report.artifacts import lineage_table, metrics_table, reconstruction_markdown, samples_markdown
from tasks.report.data import ReportData
from tasks.report.pixels import psnr
from tasks.report.run import RunFolder


def publish(data: ReportData, folder: RunFolder) -> None:
    """Creates the artifacts in the current task run."""
    create_table_artifact(metrics_table(data.metrics), key="metrics", description="What was measured")
    create_table_artifact(lineage_table(data.lineage), key="lineage", description="What was made from what, by digest")
    if data.originals is not None and data.reconstructions is not None:
        markdown = reconstruction_markdown(
            data.originals, data.reconstructions, psnr(data.originals, data.reconstructions)
        )
        create_markdown_artifact(markdown, key="reconstructions", description="Test images and their reconstructions")
    if data.samples is not None:
        markdown = samples_markdown(data.samples, data.sample_labels)
        create_markdown_artifact(markdown, key="samples", description="Uncurated samples of the diffusion model")
    create_markdown_artifact(report_markdown(folder), key="report", description="Where the whole report is")


def report_markdown(folder: RunFolder) -> str:
    """Headline figures and the report's place."""
    headline = [
        ("PSNR, test", folder.metrics.get("psnr_test"), "{:.2f} dB"),
        ("Top-1, test", folder.metrics.get("top1_test"), "{:.1%}"),
        ("Bits per latent number", folder.metrics.get("bits_per_dim"), "{:.2f}"),
    ]
    lines = [f"- {name}: **{form.format(value)}**" for name, value, form in headline if value is not None]
    return "\n".join(["## Report", "", *lines, "", f"`{folder.report_uri}` (one file, opens from disk)", ""])
