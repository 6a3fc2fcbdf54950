"""The state machine of tests/helpers/storage/state_machine.py: short in every run, long among the slow tests."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.helpers.storage.state_machine import Store

CALM = {"deadline": None, "suppress_health_check": list(HealthCheck)}


def test_readers_see_the_rows_of_a_dict() -> None:
    run_state_machine_as_test(Store, settings=settings(max_examples=6, stateful_step_count=15, **CALM))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_readers_see_the_rows_of_a_dict_five_hundred_times() -> None:
    run_state_machine_as_test(Store, settings=settings(max_examples=500, stateful_step_count=30, **CALM))
