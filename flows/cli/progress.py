"""One progress line on standard error."""

import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

from functa.flows.server.console import text_console
from functa.tasks.dispatch.progress import Pace, time_left

LINE_SECONDS = 10.0  # between lines in a pipe or a file


class ProgressLine:
    """Shows how much is done, the rate and the time left: `with ProgressLine("decoding", "images") as show`.

    On a terminal the one line is rewritten and removed at the end; elsewhere a new line follows every 10 seconds.
    """

    def __init__(self, work: str, unit: str, console: Console | None = None) -> None:
        self._work, self._unit = work, unit
        self._console = console or text_console(stderr=True)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._pace = Pace()
        self._shown = time.monotonic()

    def __enter__(self) -> "ProgressLine":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def __call__(self, done: int, total: int, written: int = 0) -> None:
        """Show that `done` of `total` units are done; `written` bytes, if any, are shown as MB/s."""
        now, rate = time.monotonic(), self._pace.per_second(done)
        if not rate or now - self._shown < (0.2 if self._live.is_started else LINE_SECONDS):
            return
        self._shown = now
        speed = f"{rate * written / done / 1e6:.0f} MB/s" if written else f"{rate:.3g} {self._unit}/s"
        line = f"{self._work}: {done} of {total} {self._unit}, {speed}, {time_left(done, total, rate)}"
        if self._live.is_started:
            self._live.update(Text(line, no_wrap=True), refresh=True)
        else:
            self._console.print(line, soft_wrap=True)
