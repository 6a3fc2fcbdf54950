"""The next step's inputs, made while this one computes."""

from collections.abc import Callable, Iterable, Iterator
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


T = TypeVar("T")


def in_order(calls: Iterable[Callable[[], T]]) -> Iterator[T]:
    """What each call returns, in their order; while one result is used, the next is made in a thread.

    One call runs at a time and at most one result waits. What a call raises is raised in its place.
    """
    with ThreadPoolExecutor(1, "reading") as pool:
        following = None
        for call in calls:
            this, following = following, pool.submit(call)
            if this is not None:
                yield this.result()
        if following is not None:
            yield following.result()
