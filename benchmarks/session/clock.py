"""The time of one call: a soft end, at which trainings save and stop, and a hard one, which nothing outlasts."""

import os
import signal
import threading
import time
from collections.abc import Callable

STOPPED = 128 + signal.SIGTERM  # exit status of what SIGTERM ended; trainings use it too


class Clock:
    """Counts the minutes of a call from its beginning, a value of time.monotonic().

    SIGTERM, from outside or at the soft end, raises SystemExit(STOPPED).
    A training in progress catches the signal itself: it saves first. What does not come back in time, such as a long
    compilation, is cut at the hard end after `save`.
    """

    def __init__(self, begun: float, minutes: float, save: Callable[[], None]) -> None:
        self._soft = begun + 60 * minutes - min(30.0, 6 * minutes)
        self._hard = begun + 60 * minutes - min(5.0, 1.2 * minutes)
        self._save = save

    def minutes(self) -> float:
        """Return the minutes until the soft end."""
        return max(0.0, self._soft - time.monotonic()) / 60

    @property
    def over(self) -> bool:
        """Return whether the soft end has passed."""
        return time.monotonic() >= self._soft

    def start(self) -> None:
        """Begin to count; from the main thread."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        signal.setitimer(signal.ITIMER_REAL, max(0.001, self._soft - time.monotonic()))
        timer = threading.Timer(max(0.0, self._hard - time.monotonic()), self._cut)
        timer.daemon = True
        timer.start()

    def ending(self) -> None:
        """Let no further signal interrupt what is saved at the end."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _stop(self, *_: object) -> None:
        raise SystemExit(STOPPED)

    def _cut(self) -> None:
        self._save()
        print("the time is over; what was running continues at its last checkpoint in the next call", flush=True)
        os._exit(0)
