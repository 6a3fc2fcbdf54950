"""Many requests side by side: over a network one takes as long as thirty."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from functa.storage.places.location import Location

MOST = 32  # of a process

FEW = 3  # so many are made one after the other

Item = TypeVar("Item")
Answer = TypeVar("Answer")

_POOLS: dict[int, ThreadPoolExecutor] = {}  # by process: a fork has none of its parent's threads


def side_by_side(location: Location, act: Callable[[Item], Answer], items: Iterable[Item]) -> Iterator[Answer]:
    """Yield act(item) of each item, in order; so many at a time as the location answers side by side.

    Twice as many answers are held. `act` must not call this itself. Raises what `act` raises.
    """
    found, most = list(items), location.requests
    if most == 1 or len(found) <= FEW:
        yield from map(act, found)
        return
    pool = _POOLS.setdefault(os.getpid(), ThreadPoolExecutor(MOST, thread_name_prefix="functa-requests"))
    waiting: deque[Future[Answer]] = deque()
    try:
        for item in found:
            waiting.append(pool.submit(act, item))
            if len(waiting) >= 2 * most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
