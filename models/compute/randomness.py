"""The source of a training run's randomness: seeds of several numbers, and noise that depends on its seed alone."""

import math

import torch
from torch import Tensor


def mix(*numbers: int) -> int:
    """A 63-bit seed of several integers: SplitMix64's finaliser over a running sum; no hash() of Python's."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 1


def stage_number(stage: str) -> int:
    """Stages of one seed draw from different streams."""
    return int.from_bytes(stage.encode()[:7], "big")


def gaussian_noise(seeds: Tensor, step: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise [N, *shape], float32: row i is a function of (seeds[i], step) alone, on any device.

    A counter-based generator (SplitMix64, Steele et al. 2014, whose stream each (seed, step) enters at a hashed
    place), then Box-Muller: about 9 ns a number on one core, thrice torch.randn, which has no stream for each row.
    """
    count = math.prod(shape)
    pairs = torch.arange(1, (count + 1) // 2 + 1, device=seeds.device)  # [n / 2]
    start = _scramble(_scramble(seeds) + _signed(_GOLDEN * (step + 1)))  # [N]
    bits = _scramble(start[:, None] + pairs * _signed(_GOLDEN))  # [N, n / 2], 64 random bits each
    radius = ((((bits >> 40) & 0xFFFFFF) + 1).float() * 2.0**-24).log().mul(-2).sqrt()  # of uniforms in (0, 1]
    angle = (bits & 0xFFFFFF).float() * (2 * math.pi * 2.0**-24)
    pair = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)  # [N, n]
    return pair[:, :count].reshape(-1, *shape)


_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio


def _signed(value: int) -> int:
    """The int64 that has the low 64 bits of value: torch multiplies and adds int64 modulo 2^64."""
    return (value + 2**63) % 2**64 - 2**63


def _scramble(x: Tensor) -> Tensor:
    """SplitMix64's output function: a bijection of int64 in which every bit depends on every bit."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * _signed(factor)  # the mask makes the shift logical
    return x ^ (x >> 31 & (1 << 33) - 1)
