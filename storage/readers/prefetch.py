"""Compute the next result in a thread while the caller uses this one."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetched(calls: Iterable[Callable[[], T]]) -> Generator[T, None, None]:
    """Yield the result of each call, in order; while the caller uses one, a thread computes the next.

    One call runs at a time. At most two results exist: the caller's and the next one. What a call raises is raised
    in its turn; the thread ends with the iterator, after the call that it is running.
    """
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(1, "prefetch") as thread:
        for call in calls:
            waiting.append(thread.submit(call))
            if len(waiting) == 2:
                yield waiting.popleft().result()  # neither the future nor its result is kept here meanwhile
        while waiting:
            yield waiting.popleft().result()
