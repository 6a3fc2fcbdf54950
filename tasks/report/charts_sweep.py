"""Charts of a sweep: a metric over its key, mean and sd over seeds; lines for a second key; dots for more."""

from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from tasks.report.charts import BLUE, GREEN, INK, PURPLE, STYLE, VERMILION, new_figure, to_svg
from tasks.report.describe import short
from tasks.sweep import Setting, Summary

LINES = tuple(
    (colour, style, marker)
    for style, markers in (("-", "os^D"), ("--", "vP*X"))
    for colour, marker in zip((BLUE, VERMILION, GREEN, PURPLE), markers)
)
LOGARITHMIC_FROM = 50.0  # largest over smallest value
Number = Callable[[str], float | None]


def over_axes(settings: Sequence[Setting], axes: tuple[str, ...], metric: str, number: Number) -> bytes | None:
    """SVG of the metric over one or two axes, or a panel of dots for each of more; None without two values.

    number: a value's number, or None where it is a word.
    """
    having = [each for each in settings if metric in each.summaries]
    if len(having) < 2:
        return None
    with matplotlib.rc_context(STYLE):
        if len(axes) > 2:
            figure, panels = new_figure(len(axes), height=1.9)
            for place, (axis, name) in enumerate(zip(panels, axes, strict=True)):
                ticks = _Ticks([each.values[place] for each in having], number)
                for each in having:
                    values = each.summaries[metric].values
                    axis.plot([ticks.place(each.values[place])] * len(values), values, "o", color=BLUE, alpha=0.6)
                _finish(axis, ticks, name, metric)
            return to_svg(figure)
        figure, (axis,) = new_figure(1, height=3.0)
        x = _horizontal(having, len(axes), number)
        ticks = _Ticks([each.values[x] for each in having], number)
        lines = list(dict.fromkeys(each.values[1 - x] for each in having)) if len(axes) == 2 else [""]
        for place, line in enumerate(lines):
            part = [each for each in having if len(axes) == 1 or each.values[1 - x] == line]
            part.sort(key=lambda each: ticks.place(each.values[x]))
            places = [ticks.place(each.values[x]) for each in part]
            _line(axis, places, [each.summaries[metric] for each in part], LINES[place % len(LINES)], line)
        _finish(axis, ticks, axes[x], metric)
        if len(axes) == 2:
            title = axes[1 - x].rpartition(".")[2]
            figure.legend(loc="outside upper left", ncols=min(4, len(lines)), title=short(title, 40), handlelength=2.4)
        return to_svg(figure)


def _line(
    axis: Axes, places: Sequence[float], summaries: Sequence[Summary], look: tuple[str, str, str], name: str
) -> None:
    colour, style, marker = look
    means = [each.mean for each in summaries]
    sds = [each.sd or 0.0 for each in summaries]
    for place, each in zip(places, summaries):
        if len(each.values) > 1:
            axis.plot([place] * len(each.values), each.values, "_", color=INK, markersize=7, zorder=4)
    axis.errorbar(
        places, means, yerr=sds if any(sds) else None, color=colour, linestyle=style, marker=marker, markersize=5,
        linewidth=1.8, capsize=3, label=short(name, 20),
    )  # fmt: skip


class _Ticks:
    """Where values stand on an axis: numbers at their place, on a log scale where they span much; words in turn."""

    def __init__(self, values: Sequence[str], number: Number) -> None:
        self.values = list(dict.fromkeys(values))
        found = [number(value) for value in self.values]
        self.numbers = [value for value in found if value is not None]
        self.numeric = len(self.numbers) == len(self.values) and all(np.isfinite(self.numbers))
        self._places = dict(zip(self.values, self.numbers if self.numeric else range(len(self.values))))

    def place(self, value: str) -> float:
        return float(self._places[value])

    @property
    def logarithmic(self) -> bool:
        return self.numeric and min(self.numbers) > 0 and max(self.numbers) / min(self.numbers) >= LOGARITHMIC_FROM


def _horizontal(settings: Sequence[Setting], axes: int, number: Number) -> int:
    """Of two axes: a numeric one, that of more values; the other is told by lines."""
    if axes == 1:
        return 0
    found = [_Ticks([each.values[place] for each in settings], number) for place in (0, 1)]
    return max((0, 1), key=lambda place: (found[place].numeric, len(found[place].values), -place))


def _finish(axis: Axes, ticks: _Ticks, name: str, metric: str) -> None:
    axis.set(xlabel=short(name, 48), ylabel=short(metric, 28))
    if not ticks.numeric:
        axis.set_xticks(range(len(ticks.values)), [short(value, 16) for value in ticks.values])
        axis.margins(x=0.15)
        return
    if ticks.logarithmic:
        axis.set_xscale("log")
        axis.xaxis.set_minor_locator(NullLocator())
    if len(ticks.values) <= 9:
        axis.set_xticks(sorted(ticks.numbers))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.grid(axis="x", visible=False)
