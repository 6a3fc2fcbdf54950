"""How the training latents' channels are spread (Fig. 8)."""

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.ticker import MaxNLocator

from functa.tasks.report.blocks import Drawing, ReportData, Section
from functa.tasks.report.charts import BLUE, INK, PAPER, STYLE, VERMILION, new_figure, to_svg


def section(data: ReportData) -> Section | None:
    """Mean and standard deviation per channel."""
    arrays = data.arrays.get("latents", {})
    if not {"mean", "sd"} <= arrays.keys():
        return None
    note = "Over latent positions and training images, as readers of the functaset see them."
    svg = channel_spread(arrays["mean"], arrays["sd"])
    return Section("latents", "Latents", "", (Drawing("latent_channels", "Channels of the latents", svg, note),))


Numbers = npt.NDArray[np.float64]

MARKED_UP_TO = 64  # channels; more are a line without marks


def channel_spread(mean: Numbers, sd: Numbers) -> bytes:
    """Mean and standard deviation of every channel, [c] each (Fig. 8)."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(2, height=1.9)
        panels = zip(axes, ("mean", "standard deviation"), (mean, sd), (BLUE, VERMILION), strict=True)
        for axis, title, values, colour in panels:
            if len(values) <= MARKED_UP_TO:
                axis.bar(np.arange(len(values)), values, color=colour, edgecolor=PAPER, linewidth=0.4)
            else:
                axis.plot(np.arange(len(values)), values, color=colour, linewidth=0.8)
            axis.axhline(0, color=INK, linewidth=0.8)
            axis.set_title(title)
            axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            axis.yaxis.set_major_locator(MaxNLocator(4))
            axis.grid(axis="x", visible=False)
        axes[-1].set_xlabel("channel")
        return to_svg(figure)
