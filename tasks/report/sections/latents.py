"""How the training latents' channels are spread (Fig. 8)."""

from tasks.report import charts_latents
from tasks.report.blocks import Drawing, Section
from tasks.report.data import ReportData


def section(data: ReportData) -> Section | None:
    """Mean and standard deviation per channel."""
    arrays = data.arrays.get("latents", {})
    if not {"mean", "sd"} <= arrays.keys():
        return None
    note = "Over latent positions and training images, as readers of the functaset see them."
    svg = charts_latents.channel_spread(arrays["mean"], arrays["sd"])
    return Section("latents", "Latents", "", (Drawing("latent_channels", "Channels of the latents", svg, note),))
