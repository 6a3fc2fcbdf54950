"""The images of a plan, found again by their keys: what came, went or changed since then shifts no other row."""

from collections.abc import Sequence

import numpy as np

from storage.config import ImagesConfig
from storage.images import ImageBatch, Images, open_images
from storage.plans import ShardRows


class PlannedImages:
    """An image source as it is now, read by the keys and version tokens of a plan."""

    def __init__(self, config: ImagesConfig) -> None:
        # Of all splits and without a limit: one file more moves others over either border.
        self.images: Images = open_images(config.model_copy(update={"limit": None, "classes": None}))
        splits = self.images.splits.items()
        self._places = {key: (name, row) for name, split in splits for row, key in enumerate(split.keys)}

    def read(self, rows: ShardRows) -> ImageBatch:
        """The planned rows, in the plan's order. One that is gone or of another version is bad, with its reason."""
        count, side = len(rows.keys), self.images.resolution
        whole = ImageBatch(
            images=np.zeros((count, side, side, self.images.channels), np.uint8),
            good=np.zeros(count, bool),
            reasons={p: "no longer there" for p, key in enumerate(rows.keys) if key not in self._places},
            sha256=np.zeros((count, 32), np.uint8),
            tokens=list(rows.tokens),
        )
        for name in self.images.splits:
            here = [p for p, key in enumerate(rows.keys) if self._places.get(key, ("", 0))[0] == name]
            if here:
                _put(whole, here, self.images.split(name).read([self._places[rows.keys[p]][1] for p in here]))
        return whole


def _put(whole: ImageBatch, here: Sequence[int], part: ImageBatch) -> None:
    """What was read of one split into its places, as far as it is the version that was planned."""
    for found, position in enumerate(here):
        whole.sha256[position] = part.sha256[found]
        if part.tokens[found] not in ("", whole.tokens[position]):  # "": not even its version could be read
            whole.reasons[position] = "changed since it was planned"
        elif not part.good[found]:
            whole.reasons[position] = part.reasons[found]
        else:
            whole.images[position] = part.images[found]
            whole.good[position] = True
