"""Prepare the next training step's inputs while this one computes."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Generic, TypeVar

from functa.storage.readers.prefetch import prefetched

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Calls `prepare(step)` in a thread for the step after the requested one.

    A step's inputs depend on the step alone, so timing changes nothing; an exception of `prepare` is raised to the
    caller that requests its step. Without `threaded`, inputs are prepared on request: on a CPU, with nothing to wait
    for from disk or network, a thread only takes cores from the computation.
    """

    def __init__(self, prepare: Callable[[int], T], steps: int, threaded: bool) -> None:
        self._prepare = prepare
        self._steps = steps
        self._threaded = threaded
        self._next = -1
        self._prepared: Iterator[T] = iter(())

    def __call__(self, step: int) -> T:
        """Return the inputs of a step, and begin to prepare those of the next one."""
        if not self._threaded:
            return self._prepare(step)
        if step != self._next:
            self._prepared = prefetched(partial(self._prepare, each) for each in range(step, self._steps))
        self._next = -1  # a step that fails is prepared again where it is asked for again
        inputs = next(self._prepared)
        self._next = step + 1
        return inputs
