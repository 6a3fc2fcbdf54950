"""`functa store quantize`: a functaset at fewer bits, with a progress line."""

from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Task as Bar
from rich.text import Text

from flows.config import ConfigError
from storage.config import QuantizationConfig
from storage.functaset import Functaset
from storage.locations import open_location
from storage.requantization import requantize


class _Rate(ProgressColumn):
    def render(self, task: Bar) -> Text:
        return Text("" if not task.speed else f"{task.speed:.0f} rows/s")


def quantize(source: str, destination: str, options: dict[str, Any]) -> dict[str, Any]:
    """Writes the new functaset and returns its `store info`. Raises ConfigError for options out of bounds."""
    try:
        config = QuantizationConfig(**options)
    except ValidationError as error:
        fault = error.errors()[0]
        option = str(fault["loc"][0]).replace("_", "-")
        raise ConfigError(f"--{option} {fault['input']}: {fault['msg'][:1].lower()}{fault['msg'][1:]}") from None
    columns = (TextColumn("quantising"), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    place = open_location(destination)
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task("rows", total=None)
        requantize(
            Functaset.open(source), place, config, lambda done, rows: bars.update(bar, completed=done, total=rows)
        )
    return Functaset.open(place).info()
