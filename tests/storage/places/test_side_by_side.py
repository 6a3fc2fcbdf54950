"""Requests side by side: in order, as many as the location allows, errors raised, in a fork too."""

import os
import threading
import time
from dataclasses import dataclass

import pytest

from functa.storage.places.local import LocalLocation
from functa.storage.places.side_by_side import MOST, side_by_side


@dataclass(frozen=True)
class Remote(LocalLocation):
    requests = 8


class Busy:
    """Counts how many calls are under way at once."""

    def __init__(self) -> None:
        self.now, self.most, self.lock = 0, 0, threading.Lock()

    def __call__(self, number: int) -> int:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.002)
        with self.lock:
            self.now -= 1
        return number * number


def test_answers_come_in_order_and_so_many_at_a_time_as_the_location_takes() -> None:
    for location, most in ((Remote("r"), 2 * 8), (LocalLocation("l"), 1)):
        busy = Busy()
        assert list(side_by_side(location, busy, range(100))) == [number * number for number in range(100)]
        assert (busy.most == 1) == (most == 1)
        assert busy.most <= min(most, MOST)


def test_what_an_act_raises_is_raised_and_the_rest_is_left_out() -> None:
    done = []

    def act(number: int) -> None:
        if number == 20:
            raise KeyError(number)
        done.append(number)

    with pytest.raises(KeyError):
        list(side_by_side(Remote("r"), act, range(1000)))
    assert len(done) < 100
    assert list(side_by_side(Remote("r"), str, range(5))) == list("01234")


def test_a_fork_has_threads_of_its_own() -> None:
    assert len(list(side_by_side(Remote("r"), str, range(9)))) == 9
    child = os.fork()
    if child == 0:
        os._exit(0 if len(list(side_by_side(Remote("r"), str, range(9)))) == 9 else 1)
    assert os.waitpid(child, 0)[1] == 0
