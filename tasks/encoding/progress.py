"""How an encoding run comes along, told from its receipts: rate, time left, a progress artifact."""

import time
from collections.abc import Mapping
from typing import Any

from functa.storage.errors import StorageError
from functa.storage.places.address import open_location
from functa.storage.upkeep.status import written
from functa.tasks.dispatch.progress import Progress, time_left
from functa.tasks.encoding.plan import Planned

TOLD_IMAGES = 32  # that a rate is told of

LOOK_SECONDS = 5.0  # between listings


class Following:
    """Tells of a run while its groups are encoded; called with the stats of those that are done."""

    def __init__(self, functaset: str, planned: Planned) -> None:
        self._location, self._planned = open_location(functaset), planned
        self._shards = sum(len(group.shards) for group in planned.groups)
        self._images = sum(group.images for group in planned.groups)
        self._progress = Progress("encode-progress", f"Encoding of {self._images} images in {self._shards} shards")
        self._before = self._done()
        self._begun = self._looked = time.monotonic()

    def __call__(self, stats: list[dict[str, Any]]) -> None:
        """A line, if the last one was told a while ago."""
        now = time.monotonic()
        last = len(stats) == len(self._planned.groups)
        if not last and now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        done = self._done()
        if done is not None:
            self._before = done if self._before is None else self._before
            self._progress.show(done, self._shards, self._line(done, done - self._before, now - self._begun, stats))

    def _done(self) -> int | None:
        """Shards that stand; None from a store that is away for a while: who must read it says so."""
        try:
            return written(self._location, self._planned.fragments)
        except StorageError:
            return None

    def _line(self, done: int, new: int, seconds: float, stats: list[dict[str, Any]]) -> str:
        since = new / max(1e-9, seconds)
        parts = [f"{done} of {self._shards} shards"]
        if new:
            parts.append(f"{since * self._images / self._shards:.0f} images/s")
        good = sum(each["images"] - each["bad"] for each in stats)
        if good:
            parts.append(f"PSNR {sum(each['psnr'] for each in stats) / good:.2f} dB")
        parts.append(f"{sum(each['bad'] for each in stats)} bad inputs")
        left = time_left(done, self._shards, since)
        return ", ".join(parts + ([left] if left and done < self._shards else []))


def encoding_speed(stats: list[dict[str, Any]], before: Mapping[str, Any] | None = None) -> dict[str, float]:
    """{encode_images_per_s}: of all groups, from the begin of the first to the end of the last.

    Where a few images or none were encoded it is that of the figures before, if they have it: the time of a few is what
    it takes to begin.
    """
    worked = [each for each in stats if each["images"]]
    if sum(each["images"] for each in worked) < TOLD_IMAGES:
        return {name: value for name, value in (before or {}).items() if name == "encode_images_per_s"}
    seconds = max(each["begun"] + each["seconds"] for each in worked) - min(each["begun"] for each in worked)
    return {"encode_images_per_s": round(sum(each["images"] for each in worked) / max(1e-9, seconds), 2)}
