"""The next step's inputs, made while this one computes."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Calls `prepare(step)` for the step after the one that was asked for, in one thread.

    What a step is given depends on the step alone, so nothing changes with the timing; an exception of `prepare` is
    raised to whoever asks for its step. One call runs at a time and at most one result waits. Not `threaded`, inputs
    are made when they are asked for: on a CPU without waiting for a disk or a network the thread only takes the
    computation's cores.
    """

    def __init__(self, prepare: Callable[[int], T], steps: int, threaded: bool) -> None:
        self._prepare = prepare
        self._steps = steps
        self._thread = ThreadPoolExecutor(1, "inputs") if threaded else None
        self._next: tuple[int, Future[T]] | None = None

    def __call__(self, step: int) -> T:
        """The inputs of a step; from here on the next one's are in the making."""
        if self._thread is None:
            return self._prepare(step)
        waiting, self._next = self._next, None
        future = waiting[1] if waiting and waiting[0] == step else self._thread.submit(self._prepare, step)
        if step + 1 < self._steps:
            self._next = step + 1, self._thread.submit(self._prepare, step + 1)
        return future.result()
