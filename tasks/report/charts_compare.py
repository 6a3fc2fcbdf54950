"""Training curves of several runs over each other, a panel for each figure that was logged."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator

from tasks.report.charts import (
    MAX_POINTS,
    PANELS,
    SMOOTHED_FROM,
    STYLE,
    log_scale,
    logged,
    new_figure,
    running_mean,
    to_svg,
)
from tasks.report.charts_sweep import LINES
from tasks.report.data import Row
from tasks.report.describe import short


def overlaid(curves: Mapping[str, Sequence[Row]]) -> bytes | None:
    """SVG of a stage's curves, by the runs' names: loss, PSNR and accuracy; None where nothing was logged."""
    panels = []
    for title, words in PANELS:
        by_run = {name: logged(rows, words) for name, rows in curves.items()}
        for key in dict.fromkeys(key for series in by_run.values() for key in series):
            panels.append((title, key, {name: series[key] for name, series in by_run.items() if key in series}))
    if not panels:
        return None
    styles = dict(zip(curves, (LINES[place % len(LINES)] for place in range(len(curves)))))
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(len(panels))
        for axis, (title, key, lines) in zip(axes, panels, strict=True):
            for name, (steps, values) in lines.items():
                values = 100 * values if title.endswith("%") else values
                values = running_mean(values, max(3, len(values) // 40)) if len(values) >= SMOOTHED_FROM else values
                colour, style, marker = styles[name]
                every = -(-len(steps) // MAX_POINTS)
                axis.plot(
                    steps[::every], values[::every], color=colour, linestyle=style, marker=marker, markersize=4,
                    markevery=max(1, len(steps[::every]) // 8), linewidth=1.6, label=short(name, 40),
                )  # fmt: skip
            axis.set_title(short(f"{title} ({key})" if key not in title else title, 48))
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
            if title == "loss" and all((values > 0).all() for _, values in lines.values()):
                log_scale(axis, np.concatenate([values for _, values in lines.values()]))
        axes[-1].set_xlabel("step")
        handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
        figure.legend(handles.values(), handles.keys(), loc="outside upper left", handlelength=3)
        return to_svg(figure)
