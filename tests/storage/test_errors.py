"""Errors that are shown to people: an error class added anywhere is printed by the command as one line."""

import sys

import cyclopts
import pytest

from functa.flows.cli import main as command
from functa.storage.errors import FunctaError, StorageError, one_line


class ToyError(StorageError):
    """The error of CONTRIBUTING.md, "Add an error"."""


class ToyUsageError(FunctaError):
    exit_status = 2


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ToyError("/data/moon:\n  no planet; use a planet"), 1, "functa: /data/moon: no planet; use a planet"),
        (ToyUsageError("--planet moon: is no planet"), 2, "functa: --planet moon: is no planet"),
        (ZeroDivisionError("by zero"), 1, "functa: ZeroDivisionError: by zero (--debug shows where)"),
    ],
)
def test_the_command_prints_a_new_error_as_one_line_without_being_changed(
    error: Exception,
    status: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    toy = cyclopts.App()

    @toy.command
    def orbit() -> None:
        raise error

    monkeypatch.setattr(command, "app", toy)
    monkeypatch.setattr(sys, "argv", ["functa", "orbit"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == status
    assert capsys.readouterr().err == line + "\n"


def test_an_error_without_a_message_is_described_by_its_type() -> None:
    assert one_line(TimeoutError()) == "TimeoutError"
    assert one_line(ValueError("two\nlines")) == "two lines"
