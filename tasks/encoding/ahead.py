"""The next batch read while this one is encoded."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

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
