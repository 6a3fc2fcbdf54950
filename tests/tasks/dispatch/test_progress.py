"""Lines in a run's log."""

from types import SimpleNamespace

import prefect
import pytest

from functa.tasks.dispatch import progress
from functa.tasks.dispatch.progress import Lines, count


def test_no_line_is_logged_twice_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[str] = []
    monkeypatch.setattr(prefect, "get_run_logger", lambda: SimpleNamespace(info=logged.append))
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    lines = Lines()
    for done in (1, 2, 2):
        lines.show(done, 2, f"{done} of 2")
    assert logged == ["1 of 2", "2 of 2"]


def test_one_is_singular() -> None:
    assert [count(number, "bad input") for number in (0, 1, 2000)] == [
        "0 bad inputs",
        "1 bad input",
        "2,000 bad inputs",
    ]
