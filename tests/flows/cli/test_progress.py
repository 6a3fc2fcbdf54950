"""The progress line of commands: rewritten on a terminal, seldom repeated elsewhere."""

import io
import re

import pytest
from rich.console import Console

from functa.flows.cli import progress
from functa.flows.cli.progress import ProgressLine


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the line sees, to be set."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def line_in(file: io.StringIO, work: str, unit: str, terminal: bool = False) -> ProgressLine:
    return ProgressLine(work, unit, Console(file=file, force_terminal=terminal, width=100, highlight=False))


def test_the_rate_leaves_out_what_was_done_at_first(clock: list[float]) -> None:
    file = io.StringIO()
    with line_in(file, "decoding", "images") as line:
        clock[0] += 60  # loading and compiling
        line(4, 100)
        clock[0] += 20
        line(44, 100)
    assert file.getvalue() == "decoding: 44 of 100 images, 2 images/s, 0:28 left\n"


def test_a_pipe_gets_a_line_every_ten_seconds(clock: list[float]) -> None:
    file = io.StringIO()
    with line_in(file, "hydrating", "shards") as line:
        for done in range(31):
            line(done, 31, written=done * 2_000_000)
            clock[0] += 1
    lines = file.getvalue().splitlines()
    assert len(lines) == 3
    assert "2 MB/s" in lines[0]


def test_a_terminal_has_one_line_which_disappears(clock: list[float]) -> None:
    file = io.StringIO()
    with line_in(file, "sampling", "images", terminal=True) as line:
        for done in range(1, 6):
            line(done, 5)
            clock[0] += 1
    text = file.getvalue()
    assert set(re.findall(r"sampling: (\d) of 5 images", text)) == {"2", "3", "4", "5"}
    assert text.count("\n") == 1
    assert text.endswith("\x1b[1A\x1b[2K")  # up and erased
