"""Uniform quantisation: 2^bits bins per latent dimension (paper App. C.4.4), stored as one byte a number."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from functa.storage.config import QuantizationConfig
from functa.storage.errors import StorageError

NEAR = 2.0**-12  # steps; a position of at most 257 that is computed in single precision is off by less than a fifth

PART = 1 << 16  # numbers that are quantised at once


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
        codes = np.empty(z.shape, np.uint8)
        return codes, int(sum(self._code(part, codes[rows]).sum() for rows, part in _parts(z)))

    def outside(self, z: np.ndarray) -> np.ndarray:
        """Return how many numbers of each row of z [n, s, s, c] lie outside the range, int64 [n]; 0 if not finite."""
        finite = np.isfinite(z).reshape(len(z), -1).all(1)
        counts = np.zeros(len(z), np.int64)
        known = z if finite.all() else z[finite]
        counts[finite] = [
            count for _, part in _parts(known) for count in self._code(part, np.empty(part.shape, np.uint8))
        ]
        return counts

    def _code(self, z: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Write the codes of a few rows; return how many numbers of each row lie outside the range, int64 [n].

        A position is the number of steps above the low end, (z - low) / step in double precision. In single precision
        it is off by less than NEAR, so that only positions so close to a whole number are computed again.
        """
        top = np.float32((1 << self.bits) - 1)
        with np.errstate(all="ignore"):  # what overflows is computed again
            position = z.astype(np.float32, copy=False) - self.low
            position *= self._steps_per_unit if z.dtype == np.float32 else np.float32(np.nan)
            bins = np.floor(position)
            position -= bins
            position -= np.float32(0.5)
            again = np.flatnonzero(~(np.abs(position, out=position) <= np.float32(0.5 - NEAR)))
            np.clip(bins, 0, top, out=position)
            codes[...] = position
        outside = position != bins
        if len(again):
            at = np.unravel_index(again, z.shape)
            low, step = (np.broadcast_to(each, z.shape)[at] for each in (self.low, self.step))
            exact = (z[at].astype(np.float64) - low) / step
            codes[at] = np.clip(np.floor(exact), 0, top)
            outside[at] = (exact < 0) | (exact > 1 << self.bits)
        if not outside.any():
            return np.zeros(len(z), np.int64)
        return np.array([np.count_nonzero(row) for row in outside], np.int64)

    @cached_property
    def _steps_per_unit(self) -> np.ndarray:
        """Return 1 / step as float32; not a number where its precision would not suffice."""
        with np.errstate(all="ignore"):
            found = (1 / self.step.astype(np.float64)).astype(np.float32)
        return np.where((found > 1e-30) & (found < 1e30), found, np.float32(np.nan)).astype(np.float32)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Return codes uint8 [n, s, s, c] as float32 [n, s, s, c]."""
        z = np.empty(codes.shape, np.float32)
        for rows, part in _parts(codes):
            np.add(part, np.float32(0.5), out=z[rows])
            z[rows] *= self.step
            z[rows] += self.low
        return z


def _parts(z: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield a few rows at a time, which stay in a core's cache."""
    rows = max(1, PART // max(1, z[:1].size))
    for start in range(0, len(z), rows):
        part = slice(start, start + rows)
        yield part, z[part]


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
