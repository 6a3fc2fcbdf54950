"""Prefetched inputs equal those prepared on request, one call at a time, and faults reach the caller."""

import threading
import time

import pytest

from functa.tasks.inputs.prefetch import Prefetcher


@pytest.mark.parametrize("threaded", [False, True])
def test_every_step_gets_its_own_inputs_even_after_a_jump(threaded: bool) -> None:
    prefetcher = Prefetcher(lambda step: step * 10, steps=9, threaded=threaded)
    assert [prefetcher(step) for step in (3, 4, 5, 7, 8)] == [30, 40, 50, 70, 80]


def test_the_next_step_is_prepared_while_this_one_computes_and_none_after_the_last() -> None:
    made: list[int] = []
    busy = threading.Lock()

    def prepare(step: int) -> int:
        assert busy.acquire(blocking=False), "two at once"
        made.append(step)
        time.sleep(0.01)
        busy.release()
        return step

    prefetcher = Prefetcher(prepare, steps=3, threaded=True)
    prefetcher(0)
    deadline = time.monotonic() + 10
    while made != [0, 1] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert made == [0, 1]
    prefetcher(1)
    prefetcher(2)
    time.sleep(0.1)
    assert made == [0, 1, 2]


def test_a_fault_is_raised_when_its_own_step_is_requested() -> None:
    def prepare(step: int) -> int:
        if step == 1:
            raise OSError("no such disk")
        return step

    prefetcher = Prefetcher(prepare, steps=3, threaded=True)
    assert prefetcher(0) == 0
    with pytest.raises(OSError, match="no such disk"):
        prefetcher(1)
