"""Noise levels without timesteps: EDM (Karras et al. 2022) and rectified flow (Liu et al. 2022), and Heun's sampler.

A noisy latent is x = x0 + s n for EDM and x = (1 - s) x0 + s n for the flow, s its level. Both samplers follow
dx/ds = (x - x0) / s from noise alone down to s = 0, with the x0 that the network expects at x. The coefficients of EDM
are those of Karras et al., Table 1; diffusers has no Heun sampler for them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from functa.models.config import DiffusionConfig

Predict = Callable[[Tensor, Tensor], Tensor]  # (x [B, s, s, c], t [B]) -> the network's output [B, s, s, c]

Progress = Callable[[int, int], None]  # (denoiser calls done, calls in all)

# EDM's levels for data of this standard deviation; for another one they are scaled.
SIGMA_DATA = 0.5
P_MEAN, P_STD = -1.2, 1.2  # of ln(level) in training
SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0  # of the sampler

FLOW_TIME = 1000.0  # the level as the network sees it, so that its sinusoids resolve it as they do timesteps


class Task(NamedTuple):
    """Inputs of the network, x [B, s, s, c] and t [B], and the output that it should have, [B, s, s, c]."""

    x: Tensor
    t: Tensor
    target: Tensor


@dataclass(frozen=True)
class Edm:
    """EDM's preconditioning: for data of standard deviation sd inputs and targets have variance 1 at every level.

    The loss of Karras et al., weighted by 1 / c_out^2, is then the plain mean squared error of the target.
    """

    sd: float

    @property
    def scale(self) -> float:
        """A level here over the one that EDM has for it."""
        return self.sd / SIGMA_DATA

    def draw_levels(self, count: int, generator: torch.Generator) -> Tensor:
        """Levels of a training batch, float32 [count], on the generator's device."""
        normal = torch.randn(count, generator=generator, device=generator.device)
        return self.scale * (P_MEAN + P_STD * normal).exp()

    def task(self, x0: Tensor, noise: Tensor, levels: Tensor) -> Task:
        """The network's task at these levels [B]; target = (x0 - c_skip x) / c_out, written without cancellation."""
        s = levels[:, None, None, None]
        length = (s.square() + self.sd**2).sqrt()
        target = (s / self.sd * x0 - self.sd * noise) / length
        return Task((x0 + s * noise) / length, (levels / self.scale).log() / 4, target)

    def expected(self, predict: Predict, x: Tensor, level: float) -> Tensor:
        """The x0 [B, s, s, c] that the network expects at x, float32."""
        length = math.hypot(level, self.sd)
        t = torch.full((len(x),), math.log(level / self.scale) / 4, device=x.device)
        output = predict(x / length, t).float()
        return (self.sd / length) ** 2 * x + level * self.sd / length * output

    def levels(self, steps: int) -> list[float]:
        """The sampler's levels, noisiest first, without the 0 that follows."""
        high, low = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
        return [self.scale * (high + i / (steps - 1) * (low - high)) ** RHO for i in range(steps)]


@dataclass(frozen=True)
class Flow:
    """Rectified flow: levels from 0 to 1, all as likely; the network predicts noise minus latent."""

    def draw_levels(self, count: int, generator: torch.Generator) -> Tensor:
        """Levels of a training batch, float32 [count], on the generator's device."""
        return torch.rand(count, generator=generator, device=generator.device)

    def task(self, x0: Tensor, noise: Tensor, levels: Tensor) -> Task:
        """The network's task at these levels [B]."""
        s = levels[:, None, None, None]
        return Task((1 - s) * x0 + s * noise, FLOW_TIME * levels, noise - x0)

    def expected(self, predict: Predict, x: Tensor, level: float) -> Tensor:
        """The x0 [B, s, s, c] that the network expects at x, float32."""
        t = torch.full((len(x),), FLOW_TIME * level, device=x.device)
        return x - level * predict(x, t).float()

    def levels(self, steps: int) -> list[float]:
        """The sampler's levels, evenly from 1 down, without the 0 that follows."""
        return [1 - i / steps for i in range(steps)]


def continuous_process(config: DiffusionConfig) -> Edm | Flow:
    """Return the process of a config whose kind is edm or flow."""
    return Edm(config.sigma_data) if config.kind == "edm" else Flow()


def heun(
    expected: Callable[[Tensor, float], Tensor], levels: Sequence[float], noise: Tensor, progress: Progress
) -> Tensor:
    """Draw samples by Heun's method, deterministic after the initial noise [B, s, s, c]; expected(x, level) is x0.

    Each step takes the mean of the slopes at both of its ends. The last one, to level 0, has no slope at its end and
    returns x0 itself.
    """
    calls = 2 * len(levels) - 1
    x = levels[0] * noise
    for done, (level, following) in enumerate(pairwise(levels)):
        slope = (x - expected(x, level)) / level
        progress(2 * done + 1, calls)
        ahead = x + (following - level) * slope
        slope = (slope + (ahead - expected(ahead, following)) / following) / 2
        progress(2 * done + 2, calls)
        x = x + (following - level) * slope
    x0 = expected(x, levels[-1])
    progress(calls, calls)
    return x0
