"""Sums over the receipts of many shards: rows, bytes, clipped numbers and PSNR, without keeping the receipts."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from functa.storage.functaset.receipts.receipt import BINS_PER_DB, Receipt

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass
class ReceiptSum:
    """Sums over receipts. bytes: of all objects; z_bytes: of the latents among them."""

    rows: int = 0
    good: int = 0
    clipped: int = 0
    bytes: int = 0
    z_bytes: int = 0
    psnr: list[float] = field(default_factory=list)  # a sum in dB of each shard
    histogram: Counter[int] = field(default_factory=Counter)

    def add(self, receipt: Receipt) -> None:
        """Add one receipt."""
        self.rows += receipt.rows
        self.good += receipt.good
        self.clipped += receipt.clipped
        self.bytes += sum(record.bytes for record in receipt.objects.values())
        self.z_bytes += sum(record.bytes for key, record in receipt.objects.items() if key.startswith("z/"))
        self.psnr.append(receipt.psnr.sum)
        self.histogram.update(receipt.psnr.histogram)


def quantiles_of(sums: Sequence[ReceiptSum]) -> dict[str, Any]:
    """Return the mean PSNR, and quantiles to a tenth of a dB; empty where no row is good."""
    counts = sum((each.histogram for each in sums), Counter[int]())
    total = counts.total()
    if total == 0:
        return {}
    bins = sorted(counts)
    reached = np.cumsum([counts[number] for number in bins])
    quantiles = {f"{q:g}": (bins[int(np.searchsorted(reached, q * total))] + 0.5) / BINS_PER_DB for q in QUANTILES}
    return {"mean": sum(value for each in sums for value in each.psnr) / total, "quantiles": quantiles}
