"""Prefect's console log shows an error once: where it happened."""

import logging

from functa.flows.server.session import Unhelpful, shortened

FAULT = "TrainingFailed: 4 of 55 train images cannot be used"


def shown(logger: str, message: str, *arguments: object) -> str:
    """Return what the console shows of one record, an empty string for none."""
    record = logging.LogRecord(logger, logging.ERROR, __file__, 1, message, arguments, None)
    return shortened(logging.Formatter("%(message)s").format)(record) if Unhelpful().filter(record) else ""


def test_an_error_is_shown_by_its_task_and_not_again_by_every_flow_around_it() -> None:
    failed = "Finished in state Failed('Flow run encountered an exception: %s')"
    assert FAULT in shown("prefect.task_runs", f"Finished in state Failed('Task run encountered an exception {FAULT}')")
    assert shown("prefect.flow_runs", "Encountered exception during execution: %r", Exception(FAULT)) == ""
    line = shown("prefect.flow_runs", failed, FAULT)
    assert FAULT not in line
    assert "Finished in state Failed()" in line


def test_other_lines_of_a_flow_are_shown_in_full() -> None:
    assert "58 samples (of 100 %) are few" in shown("prefect.flow_runs", "58 samples (of 100 %) are few")
    assert "Finished in state Completed()" in shown("prefect.flow_runs", "Finished in state Completed()")
