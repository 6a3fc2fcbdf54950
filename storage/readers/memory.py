"""A split in memory: codes (a byte a number) or float32, gathered by numpy."""

import numpy as np

from functa.storage.readers.reader import Batch, Indexed
from functa.storage.readers.shards import SplitShards


class Resident(Indexed):
    """All visible rows in memory, read and checked once.

    z uint8 codes or float32 [n, s, s, c], labels int32 [n], ids uint8 [n, 16]; which uint16 [n] is the number
    of each row's quantizer, None where there are not several.
    """

    def __init__(self, split: SplitShards) -> None:
        super().__init__(split.name, split.rows, split.latent_shape, split.quantizers)
        # The whole is allocated once and filled shard by shard: two copies would not fit where one does.
        self.z = np.empty((split.rows, *split.latent_shape), split.dtype)
        self.labels = np.empty(split.rows, np.int32)
        self.ids: np.ndarray = np.empty((split.rows, 16), np.uint8)
        self.which = np.empty(split.rows, np.uint16) if len(split.quantizers) > 1 else None
        start = 0
        for shard in split.shards:
            here = slice(start, start + shard.count)
            rows = split.read(shard, ids=True)
            assert rows.ids is not None
            self.z[here], self.labels[here], self.ids[here] = rows.z, rows.labels, rows.ids
            if self.which is not None:
                self.which[here] = split.quantizer_number(shard)
            start = here.stop

    def _read(self, rows: np.ndarray, ids: bool, out: np.ndarray | None) -> Batch:
        # mode="clip": numpy would check the rows, which are known to lie inside, in a copy of `out`.
        z = self.z.take(rows, 0, out=out, mode="clip")
        which = None if self.which is None else self.which[rows].astype(np.int64)
        return Batch(z, self.labels[rows], self.ids[rows] if ids else None, which)
