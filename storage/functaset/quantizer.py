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
        # In double precision: a float32 quotient can round up into the next bin.
        position = (z.astype(np.float64) - self.low) / self.step
        levels = 1 << self.bits
        clipped = int(np.count_nonzero((position < 0) | (position > levels)))
        return np.clip(np.floor(position), 0, levels - 1).astype(np.uint8), clipped

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Return codes uint8 [n, s, s, c] as float32 [n, s, s, c]."""
        z = codes.astype(np.float32)
        z += np.float32(0.5)
        z *= self.step
        z += self.low
        return z


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
