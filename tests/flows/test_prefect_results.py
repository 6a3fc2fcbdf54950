"""Prefect stores no result: a stored one names its own serializer, and a tampered one would run code."""

import pytest
from prefect import Flow, Task
from prefect.cache_policies import NO_CACHE

from functa.flows import stages
from functa.flows.pipeline import pipeline
from functa.flows.re_encode import re_encode
from functa.flows.sweep.flow import sweep
from functa.tasks import prefect_tasks

pytestmark = pytest.mark.attacks


def test_no_flow_and_no_task_keeps_its_result() -> None:
    flows = [*(each for each in vars(stages).values() if isinstance(each, Flow)), pipeline, re_encode, sweep]
    tasks = [each for each in vars(prefect_tasks).values() if isinstance(each, Task)]
    assert len(flows) >= 8
    assert len(tasks) >= 5
    for each in flows:
        assert each.persist_result is False, each.name
    for unit in tasks:
        assert (unit.persist_result, unit.cache_policy) == (False, NO_CACHE), unit.name
