"""Inputs made ahead: the same as made on demand, one at a time, and their faults reach whoever asks."""

import threading
import time

import pytest

from functa.tasks.inputs.ahead import Ahead


@pytest.mark.parametrize("threaded", [False, True])
def test_every_step_gets_its_own_inputs_even_after_a_jump(threaded: bool) -> None:
    ahead = Ahead(lambda step: step * 10, steps=9, threaded=threaded)
    assert [ahead(step) for step in (3, 4, 5, 7, 8)] == [30, 40, 50, 70, 80]


def test_the_next_step_is_made_while_this_one_computes_and_none_after_the_last() -> None:
    made: list[int] = []
    busy = threading.Lock()

    def prepare(step: int) -> int:
        assert busy.acquire(blocking=False), "two at once"
        made.append(step)
        time.sleep(0.01)
        busy.release()
        return step

    ahead = Ahead(prepare, steps=3, threaded=True)
    ahead(0)
    deadline = time.monotonic() + 10
    while made != [0, 1] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert made == [0, 1]
    ahead(1)
    ahead(2)
    time.sleep(0.1)
    assert made == [0, 1, 2]


def test_a_fault_is_raised_to_the_step_that_it_belongs_to() -> None:
    def prepare(step: int) -> int:
        if step == 1:
            raise OSError("the disk has gone")
        return step

    ahead = Ahead(prepare, steps=3, threaded=True)
    assert ahead(0) == 0
    with pytest.raises(OSError, match="the disk has gone"):
        ahead(1)
