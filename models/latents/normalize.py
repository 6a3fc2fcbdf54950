"""Normalisation of the functaset before downstream learning: z' = (z - mean) / (gamma sd) (App. C.4.1, eq. 1)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from functa.models.config import NormalizationConfig

# Dimensions that share one mean and sd: positions and channels, positions, none (App. C.4.1).
_POOLED: dict[str, tuple[int, ...]] = {"scalar": (0, 1, 2), "vector": (0, 1), "array": ()}


@dataclass(frozen=True, eq=False)
class Affine:
    """x = stored * scale + offset: dequantised and normalised by one multiply-add a number, on whichever device.

    scale, offset float32 [q, s, s, c], one of each quantiser.
    """

    scale: Tensor
    offset: Tensor

    def __call__(self, stored: Tensor, which: Tensor | None = None) -> Tensor:
        """Codes or latents [b, s, s, c] -> float32 [b, s, s, c]; `which` int64 [b]: each row's quantiser, or the first.

        Codes travel to the device as bytes, a quarter of the size of the floats that they encode.
        """
        rows = 0 if which is None else which
        return torch.addcmul(self.offset[rows], stored.to(self.scale.dtype), self.scale[rows])

    def to(self, device: torch.device | str) -> "Affine":
        """The same on another device."""
        return Affine(self.scale.to(device), self.offset.to(device))


@dataclass(frozen=True, eq=False)
class Normalizer:
    """Mean and scale = gamma sd, float32, broadcastable to [s, s, c]: [1, 1, 1], [1, 1, c] or [s, s, c]."""

    mean: Tensor
    scale: Tensor

    def normalize(self, z: Tensor) -> Tensor:
        """Latents [..., s, s, c] as stored -> normalised, of the same shape."""
        return (z - self.mean) / self.scale

    def denormalize(self, x: Tensor) -> Tensor:
        """The inverse: normalised latents [..., s, s, c] -> latents as the field reads them."""
        return x * self.scale + self.mean

    def fused(self, scale: npt.ArrayLike, offset: npt.ArrayLike) -> Affine:
        """normalize(code * scale + offset) as one multiply-add; scale and offset float64 [q, s, s, c].

        Worked out in float64 and rounded once: nearer to the exact value than normalize(dequantised) in float32.
        """
        a, b = (torch.as_tensor(np.array(x, dtype=np.float64)) for x in (scale, offset))
        mean, deviation = self.mean.double().cpu(), self.scale.double().cpu()
        return Affine((a / deviation).float(), ((b - mean) / deviation).float())

    def to(self, device: torch.device | str) -> "Normalizer":
        """The same normaliser on another device."""
        return Normalizer(self.mean.to(device), self.scale.to(device))

    def state(self) -> dict[str, Any]:
        """Nested lists for a checkpoint's JSON; a float32 survives JSON bit for bit."""
        return {"mean": self.mean.tolist(), "scale": self.scale.tolist()}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Normalizer":
        """The inverse of state(), on the CPU."""
        return cls(*(torch.tensor(state[name], dtype=torch.float32) for name in ("mean", "scale")))


def normalizer(config: NormalizationConfig, mean: npt.ArrayLike | Tensor, var: npt.ArrayLike | Tensor) -> Normalizer:
    """The normaliser of a training split whose array moments are known: no second pass over the latents.

    mean, var: per-element mean and population variance over the examples, [s, s, c]. Scalar and vector moments follow
    by the law of total variance, in float64: var = E[var_i] + Var[mean_i]. An element that never varies gets scale 1,
    so that it normalises to 0 rather than to infinity. Raises ValueError if the moments are no moments.
    """
    means, variances = (torch.as_tensor(np.array(moment, dtype=np.float64)) for moment in (mean, var))
    if means.ndim != 3 or means.shape != variances.shape:
        raise ValueError(f"moments of latents are [s, s, c], not {tuple(means.shape)} and {tuple(variances.shape)}")
    if not (torch.isfinite(means).all() and torch.isfinite(variances).all() and (variances >= 0).all()):
        raise ValueError("moments of latents are not finite, or a variance is negative: verify the functaset")
    if config.kind == "fixed":
        return Normalizer(torch.zeros(1, 1, 1), torch.full((1, 1, 1), config.factor))
    pooled = _POOLED[config.kind]
    if pooled:  # an empty tuple would reduce over everything
        centre = means.mean(pooled, keepdim=True)
        variances = (variances + (means - centre).square()).mean(pooled, keepdim=True)
        means = centre
    deviation = variances.sqrt()
    # Below float32's resolution of the mean, a deviation is the rounding of merged sums, not variation.
    resolution = torch.finfo(torch.float32)
    constant = deviation <= (means.abs() * resolution.eps).clamp(min=resolution.tiny)
    scale = torch.where(constant, 1.0, config.gamma * deviation)
    return Normalizer(means.float(), scale.float())
