"""Retries of S3 requests: bounded, alike for every operation, and only of faults that may pass."""

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from functa.storage.errors import TransientError

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

# With pauses of half to all of 1, 2, 4, 8, 8, ... s: an outage of 27 s is survived whatever the random draws, one of a
# minute never.
TRIES = 10

PATIENCE_SECONDS = 60.0  # no try begins later than this after the first fault

LONGEST_PAUSE = 8.0


def retried(act: Callable[[], Answer], tries: int, sleep: Callable[[float], None]) -> Answer:
    """Return what `act` returns, tried again after a TransientError until `tries` or PATIENCE_SECONDS are used up."""
    first_fault, tried = 0.0, 0
    while True:
        try:
            return act()
        except TransientError as error:
            tried += 1
            first_fault = first_fault or time.monotonic()
            if tried >= tries or time.monotonic() - first_fault > PATIENCE_SECONDS:
                raise
            log.info("try %d of %d: %s", tried, tries, error)
        # Apart from one another, so that workers thrown out together do not come back together.
        sleep(min(LONGEST_PAUSE, 2.0 ** (tried - 1)) * random.SystemRandom().uniform(0.5, 1.0))
