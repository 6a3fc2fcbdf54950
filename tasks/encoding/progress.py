"""Progress of an encoding run, read from its receipts: rate, time left, a progress artifact."""

import time
from collections.abc import Mapping
from typing import Any

from functa.storage.errors import StorageError
from functa.storage.places.address import open_location
from functa.storage.upkeep.status import written
from functa.tasks.dispatch.progress import Pace, Progress, count, images_per_second
from functa.tasks.encoding.plan import Planned

RATED_IMAGES = 32  # with fewer, start-up dominates the rate

LOOK_SECONDS = 5.0  # between listings


class Following:
    """Reports on a run while its groups are encoded; called with the statistics of the finished ones."""

    def __init__(self, functaset: str, planned: Planned) -> None:
        self._location, self._planned = open_location(functaset), planned
        self._shards = sum(len(group.shards) for group in planned.groups)
        self._images = sum(group.images for group in planned.groups)
        self._progress = Progress("encode-progress", f"Encoding of {self._images} images in {self._shards} shards")
        self._before, self._pace = self._done(), Pace()
        self._looked = time.monotonic()

    def __call__(self, stats: list[dict[str, Any]]) -> None:
        """Show a line, unless the last one is recent."""
        now = time.monotonic()
        last = len(stats) == len(self._planned.groups)
        if not last and now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        done = self._done()
        if done is not None:
            self._progress.show(done, self._shards, self._line(done, stats))

    def _done(self) -> int | None:
        """Return the number of written shards; None while the store does not answer, which its readers report."""
        try:
            return written(self._location, self._planned.fragments)
        except StorageError:
            return None

    def _line(self, done: int, stats: list[dict[str, Any]]) -> str:
        parts = [f"{done} of {self._shards} shards"]
        begun = done != self._before  # the rate is of shards after the first that this run wrote
        speed = self._pace.per_second(done) * self._images / self._shards if begun else 0.0
        if speed:
            parts.append(images_per_second(speed))
        good = sum(each["images"] - each["bad"] for each in stats)
        if good:
            parts.append(f"PSNR {sum(each['psnr'] for each in stats) / good:.2f} dB")
        parts.append(count(sum(each["bad"] for each in stats), "bad input"))
        return ", ".join(parts) + (self._pace.left(done, self._shards) if begun else "")


def encoding_speed(stats: list[dict[str, Any]], before: Mapping[str, Any] | None = None) -> dict[str, float]:
    """Return {encode_images_per_s} of all groups, from the start of the first to the end of the last.

    With few images or none, it is that of the earlier figures `before`, if they have it: a few take little more time
    than start-up.
    """
    worked = [each for each in stats if each["images"]]
    if sum(each["images"] for each in worked) < RATED_IMAGES:
        return {name: value for name, value in (before or {}).items() if name == "encode_images_per_s"}
    seconds = max(each["begun"] + each["seconds"] for each in worked) - min(each["begun"] for each in worked)
    return {"encode_images_per_s": round(sum(each["images"] for each in worked) / max(1e-9, seconds), 2)}
