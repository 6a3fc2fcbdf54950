"""Parameters and FLOPs of classifiers and denoisers, from their config alone. Free of torch, timm and diffusers.

They are those of the networks that classifier.py and denoiser.py build; a multiply-add counts two, and norms,
activations and sines are left out, as torch's own counter leaves them out.
"""

import math
from dataclasses import dataclass

from functa.models.config import ClassifierConfig, DenoiserConfig

SINUSOID = 256  # numbers of ResidualMLP's time embedding before its MLP


@dataclass(frozen=True)
class Cost:
    """Parameters of a network or of a part of it, and the FLOPs of one example's forward pass."""

    parameters: int = 0
    flops: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.parameters + other.parameters, self.flops + other.flops)

    def __mul__(self, times: int) -> "Cost":
        return Cost(times * self.parameters, times * self.flops)


def token_count(config: ClassifierConfig, latent_shape: tuple[int, int, int]) -> int:
    """Tokens that the Transformer makes of a latent; 0 of an MLP."""
    if config.kind == "mlp":
        return 0
    return math.prod(latent_shape) // (config.token_channels or latent_shape[2])


def classifier_cost(config: ClassifierConfig, latent_shape: tuple[int, int, int], classes: int) -> Cost:
    """Return the cost of the network of build_classifier."""
    width, numbers = config.width, math.prod(latent_shape)
    if config.kind == "mlp":
        return _linear(numbers, width) + _linear(width, width) * (config.depth - 1) + _linear(width, classes)
    tokens, hidden = token_count(config, latent_shape), int(width * config.mlp_ratio)
    mlp = _linear(width, hidden, tokens) + _linear(hidden, width, tokens)
    block = _norm(width) * 2 + _linear(width, 3 * width, tokens) + _linear(width, width, tokens) + mlp
    block += _attention_of(tokens, width)
    positions = Cost(tokens * width)
    embedding = _linear(config.token_channels or latent_shape[2], width, tokens) + positions
    return embedding + block * config.depth + _norm(width) + _linear(width, classes)


def pixel_classifier_cost(width: int, features: int, channels: int, resolution: int, classes: int) -> Cost:
    """Return the cost of the network of build_pixel_classifier."""
    total = _convolution(channels, width, resolution**2) + _norm(width)
    wide, side = width, resolution
    while side > 4:
        wider, side = min(2 * wide, 4 * width), math.ceil(side / 2)
        total += _convolution(wide, wider, side**2) + _norm(wider)
        wide = wider
    return total + _linear(4 * wide, features) + _linear(features, classes)


def denoiser_cost(config: DenoiserConfig, latent_shape: tuple[int, int, int], classes: int | None) -> Cost:
    """Return the cost of the network of build_denoiser."""
    if config.kind == "unet":
        return _unet_cost(config, latent_shape, classes)
    width, numbers = config.channels, math.prod(latent_shape)
    block = _norm(width) * 2 + _linear(width, width) * 3
    ends = _linear(numbers, width) + _norm(width) + _linear(width, numbers)
    return _time(SINUSOID, width, classes) + block * config.blocks + ends


def _unet_cost(config: DenoiserConfig, latent_shape: tuple[int, int, int], classes: int | None) -> Cost:
    """From the finest level down to the coarsest and up again, where each block takes an output of the way down too."""
    side, _, channels = latent_shape
    time = 4 * config.channels
    levels = range(len(config.multipliers))
    widths = [config.channels * multiplier for multiplier in config.multipliers]
    pixels = [(side >> level) ** 2 for level in levels]

    def blocks(inputs: list[int], level: int) -> Cost:
        attends = side >> level in config.attention
        attention = _attention(widths[level], pixels[level]) if attends else Cost()
        return sum((_residual(n, widths[level], pixels[level], time) + attention for n in inputs), Cost())

    total = _convolution(channels, widths[0], pixels[0]) + _time(config.channels, time, classes)
    width, kept = widths[0], [widths[0]]
    for level in levels:
        total += blocks([width] + [widths[level]] * (config.blocks - 1), level)
        width = widths[level]
        kept += [width] * config.blocks
        if level < levels[-1]:
            total += _residual(width, width, pixels[level + 1], time)
            kept.append(width)
    total += _residual(width, width, pixels[-1], time) * 2 + _attention(width, pixels[-1])
    for level in reversed(levels):
        inputs = [width + kept.pop()] + [widths[level] + kept.pop() for _ in range(config.blocks)]
        total += blocks(inputs, level)
        width = widths[level]
        if level:
            total += _residual(width, width, pixels[level - 1], time)
    return total + _norm(width) + _convolution(width, channels, pixels[0])


def _linear(inputs: int, outputs: int, times: int = 1) -> Cost:
    return Cost((inputs + 1) * outputs, 2 * times * inputs * outputs)


def _convolution(inputs: int, outputs: int, pixels: int) -> Cost:
    return Cost((9 * inputs + 1) * outputs, 2 * pixels * 9 * inputs * outputs)


def _norm(width: int) -> Cost:
    return Cost(2 * width)


def _attention_of(tokens: int, width: int) -> Cost:
    """Products of queries with keys, and of their softmax with values."""
    return Cost(0, 4 * tokens**2 * width)


def _attention(width: int, pixels: int) -> Cost:
    return _norm(width) + _linear(width, width, pixels) * 4 + _attention_of(pixels, width)


def _time(numbers: int, width: int, classes: int | None) -> Cost:
    """The embedding of time and, with classes, of labels and none."""
    labels = 0 if classes is None else (classes + 1) * width
    return _linear(numbers, width) + _linear(width, width) + Cost(labels)


def _residual(inputs: int, outputs: int, pixels: int, time: int) -> Cost:
    """A residual block of the UNet; its shortcut is a convolution only where the width changes."""
    main = _convolution(inputs, outputs, pixels) + _convolution(outputs, outputs, pixels)
    shortcut = _linear(inputs, outputs, pixels) if inputs != outputs else Cost()
    return _norm(inputs) + _norm(outputs) + main + _linear(time, 2 * outputs) + shortcut
