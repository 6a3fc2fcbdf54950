"""The tracker's process: follows a training's metrics.jsonl until standard input closes, and sends new rows.

Nothing of a tracker is in the process of the flow or of the training: whatever it does, they go on.
"""

import math
import sys
import threading
import time
from typing import Any

from pydantic import Field, ValidationError

from functa.storage.errors import DamagedObject, TransientError, one_line
from functa.storage.functaset.records import Record
from functa.storage.places.address import open_location, read_json, write_json
from functa.storage.places.location import Location
from functa.storage.runs.checkpoints import newest_metadata
from functa.storage.runs.curve import read_curve
from functa.tasks.dispatch.tracking.job import Tracking, TrackingJob, check_installed
from functa.tasks.dispatch.tracking.trackers import TRACKERS, Point, Tracker

SECONDS = 5.0  # between looks at the curve

STATE = "tracking.json"  # beside the curve

ABOUT = ("step", "steps", "seconds")  # keys of a row that are no figures


class State(Record):
    """The last step of a curve that was sent, so that a training that continues goes on with the same run."""

    kind: Tracking
    digest: str
    run: str
    step: int = Field(ge=0)


def main() -> int:
    """Return the exit status: 0 done, 1 failed (the last line of standard error has the reason)."""
    job = TrackingJob.model_validate_json(sys.stdin.readline())
    ended = threading.Event()

    def wait() -> None:
        sys.stdin.read()  # until the parent closes it, or ends
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    try:
        check_installed(job.kind)
        follow(job, ended)
    except Exception as error:
        sys.stderr.write(f"{one_line(error)}\n")
        return 1
    return 0


def follow(job: TrackingJob, ended: threading.Event) -> None:
    """Send rows until the event is set, then what is left."""
    location = open_location(job.output)
    state = _state(location, job)
    tracker = TRACKERS[job.kind](job, state.run if state else None)
    step = state.step if state else 0
    while True:
        last = ended.wait(SECONDS)
        points = _new_points(location, job, step)
        if points:
            step = _send(tracker, points, location, job)
        if last:
            tracker.close()
            return


def _send(tracker: Tracker, points: list[Point], location: Location, job: TrackingJob) -> int:
    tracker.log(points)
    state = State(kind=job.kind, digest=job.digest, run=tracker.run, step=points[-1].step)
    write_json(location, STATE, state.model_dump(mode="json"))
    return state.step


def _new_points(location: Location, job: TrackingJob, step: int) -> list[Point]:
    """Return the rows after a step; none while the curve is that of a training which this one replaces."""
    try:
        if (newest_metadata(location) or {}).get("digest") != job.digest:
            return []
        rows = read_curve(location)
    except TransientError:
        return []  # the next look may succeed
    now = time.time()
    newest = rows[-1].get("seconds", 0.0) if rows else 0.0
    return [
        Point(row["step"], now - max(0.0, newest - row.get("seconds", newest)), _figures(row))
        for row in rows if row["step"] > step
    ]  # fmt: skip


def _figures(row: dict[str, Any]) -> dict[str, float]:
    numbers = {name: value for name, value in row.items() if name not in ABOUT and isinstance(value, int | float)}
    return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}


def _state(location: Location, job: TrackingJob) -> State | None:
    """Return how far this training was sent to this tracker before; None where it was not."""
    if not location.exists(STATE):
        return None
    try:
        state = State.model_validate(read_json(location, STATE))
    except (ValidationError, DamagedObject):
        return None  # it costs points that are there twice, and nothing else
    return state if (state.kind, state.digest) == (job.kind, job.digest) else None


if __name__ == "__main__":
    sys.exit(main())
