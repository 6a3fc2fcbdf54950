"""Uniform quantisation: 2^bits bins per latent dimension (paper App. C.4.4), stored as one byte a number."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from functa.storage.config import QuantizationConfig
from functa.storage.errors import StorageError


@dataclass(frozen=True)
class Quantizer:
    """z = low + (code + 1/2) step, codes 0 ... 2^bits - 1; low and step float32, broadcastable to [s, s, c]."""

    bits: int
    low: np.ndarray
    step: np.ndarray
    policy: str = ""  # how the range was chosen, for the record
    candidates: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # what range=auto chose among

    def encode(self, z: np.ndarray) -> tuple[np.ndarray, int]:
        """Return finite z [n, s, s, c] as (codes uint8 [n, s, s, c], how many numbers lay outside the range).

        Inside the range |decode - z| <= step / 2. What lies outside takes the nearest bin.
        """
        position, outside = self._positions(z)
        return np.clip(np.floor(position), 0, (1 << self.bits) - 1).astype(np.uint8), int(np.count_nonzero(outside))

    def outside(self, z: np.ndarray) -> np.ndarray:
        """Return how many numbers of each row of z [n, s, s, c] lie outside the range, int64 [n]; 0 if not finite."""
        finite = np.isfinite(z).reshape(len(z), -1).all(1)
        counts = np.zeros(len(z), np.int64)
        counts[finite] = np.count_nonzero(self._positions(z[finite])[1], (1, 2, 3))
        return counts

    def _positions(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return positions in steps above the low end, and which of them lie outside the range."""
        # In double precision: a float32 quotient can round up into the next bin.
        position = (z.astype(np.float64) - self.low) / self.step
        return position, (position < 0) | (position > (1 << self.bits))

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Return codes uint8 [n, s, s, c] as float32 [n, s, s, c]."""
        z = codes.astype(np.float32)
        z += np.float32(0.5)
        z *= self.step
        z += self.low
        return z


def clip_limit(max_clip_fraction: float, rows: int) -> float:
    """Return the share of the numbers of so many rows that may lie outside the range.

    Images differ in how much of them is clipped, so a few may exceed the limit of many by chance: a single one by a
    factor of 5, a hundred by 1.4, ten thousand by 1.04.
    """
    return min(1.0, max_clip_fraction * (1 + 4 / max(1, rows) ** 0.5))


def refuse_clipping(name: str, clipped: int, rows: int, dims: int, max_clip_fraction: float) -> None:
    """Raise StorageError if more numbers of `rows` rows, of `dims` each, were clipped than the limit allows."""
    share, limit = clipped / max(1, rows * dims), clip_limit(max_clip_fraction, rows)
    if share > limit:
        raise StorageError(
            f"{name}: {share:.2%} of the latent numbers of {rows} rows lie outside the quantiser's range, more than "
            f"{limit:.2%}: other images set it; encode all images into a new --root, whose range is then set from "
            f"all of them (or with more encode.calibration_images, or a wider encode.quantization.range), or allow it "
            f"with a higher max_clip_fraction"
        )


def calibrate(config: QuantizationConfig, latents: np.ndarray) -> Quantizer | None:
    """Return the quantiser for latents like these, float [n, s, s, c]; None for 32 bits.

    Raises StorageError where there are none, or where one is not finite; ValueError for range=auto, which the
    caller must choose by reconstructions.
    """
    if config.bits == 32:
        return None
    if config.range == "auto":
        raise ValueError("range=auto is no range: choose one by reconstruction first")
    if len(latents) == 0 or not np.isfinite(latents).all():
        raise StorageError("quantiser: calibration latents are none or not finite; look at the field's training")
    z = latents.astype(np.float64)
    axes = {"scalar": (0, 1, 2, 3), "channel": (0, 1, 2), "element": (0,)}[config.granularity]
    low, high = _range(config, z, axes)
    low, high = _widened(low[0], high[0])  # without the row axis: [1|s, 1|s, 1|c]
    step = ((high - low) / (1 << config.bits)).astype(np.float32)
    return Quantizer(config.bits, low.astype(np.float32), step, _policy(config))


def _range(config: QuantizationConfig, z: np.ndarray, axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    if config.range == "sigma":
        mean, sd = z.mean(axes, keepdims=True), z.std(axes, keepdims=True)
        return mean - config.sigma * sd, mean + config.sigma * sd
    if config.range == "quantile":
        low, high = np.quantile(z, [config.quantile, 1 - config.quantile], axis=axes, keepdims=True)
        return low, high
    low, high = z.min(axes, keepdims=True), z.max(axes, keepdims=True)
    return low - config.margin * (high - low), high + config.margin * (high - low)


def _widened(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Widen the range of a dimension that hardly varies, so that its bins differ in float32."""
    middle = (low + high) / 2
    half = np.maximum((high - low) / 2, np.maximum(np.abs(middle) * 5e-5, 5e-7))
    return middle - half, middle + half


def _policy(config: QuantizationConfig) -> str:
    detail = {
        "minmax": f"minmax, margin {config.margin:g}",
        "sigma": f"mean +- {config.sigma:g} sd",
        "quantile": f"quantiles {config.quantile:g} and {1 - config.quantile:g}",
    }[config.range]
    return f"{detail}, per {config.granularity}"
