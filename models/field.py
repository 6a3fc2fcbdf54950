"""The neural field: a SIREN whose sine layers are shifted by modulations, and the map from latents to modulations."""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from models.config import FieldConfig, InnerConfig
from models.grid import patch_coordinates, patch_shape, unpatchify

DECODE_PIXELS = 1 << 16


class Field(nn.Module):
    """Everything that all images share (paper section 4): SIREN weights, modulation map, meta-SGD rates.

    Layer i is sin(w0 (h W_i + b_i + m_i)); the first sine layer is modulated too; the output is linear, plus 0.5.
    Weights are stored [in, out].
    """

    def __init__(self, config: FieldConfig, inner: InnerConfig, image_channels: int, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.image_channels = image_channels
        generator = torch.Generator().manual_seed(seed)
        widths = [2, *[config.width] * (config.depth - 1), image_channels]
        bound = math.sqrt(6 / config.width) / config.w0  # SIREN; the first layer is 1 / inputs instead
        self.weights = nn.ParameterList(
            _uniform((m, n), 0.5 if i == 0 else bound, generator) for i, (m, n) in enumerate(pairwise(widths))
        )
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(n)) for n in widths[1:])
        self.modulation_weight = nn.Parameter(torch.empty(config.channels, config.modulations))
        nn.init.trunc_normal_(self.modulation_weight, a=-2, b=2, generator=generator)
        self.modulation_weight.data /= math.sqrt(config.channels)  # truncated at two of the *final* deviations
        self.modulation_bias = nn.Parameter(torch.zeros(config.modulations))
        shape = {"scalar": (), "channel": (config.channels,), "element": config.latent_shape}[inner.rates]
        low, high = inner.rates_init
        self.rates = nn.Parameter(torch.empty(shape).uniform_(low, high, generator=generator))

    def modulate(self, z: Tensor) -> list[Tensor]:
        """Latents [..., c] -> one shift [..., W] per sine layer."""
        m = z @ self.modulation_weight + self.modulation_bias  # [..., C]
        return list(m.split(self.config.width, dim=-1))

    def patches(self, z: Tensor, x: Tensor) -> Tensor:
        """Latents [N, c] at pixel coordinates x [P, 2] of each patch -> [N, P, ch]."""
        h = x
        for weight, bias, shift in zip(self.weights, self.biases, self.modulate(z)):
            h = torch.sin(self.config.w0 * (h @ weight + bias + shift[:, None]))  # [N, P, W]
        return h @ self.weights[-1] + self.biases[-1] + 0.5

    def forward(self, z: Tensor, resolution: tuple[int, int]) -> Tensor:
        """Latents [B, s, s, c] -> images [B, H, W, ch], unclamped, at any resolution that s divides."""
        x = patch_coordinates(patch_shape(resolution, self.config.spatial), z)  # [P, 2]
        chunk = max(1, DECODE_PIXELS // len(x))  # bounds memory: activations are [chunk, P, W]
        patches = [self.patches(part, x) for part in z.reshape(-1, self.config.channels).split(chunk)]
        return unpatchify(torch.cat(patches), self.config.spatial, resolution)


def _uniform(shape: tuple[int, int], bound: float, generator: torch.Generator) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=generator))


def forward_flops(config: FieldConfig, resolution: tuple[int, int], image_channels: int) -> int:
    """Of one image through the field; a multiply-add counts two."""
    pixels = resolution[0] * resolution[1]
    per_pixel = 2 * (2 * config.width + (config.depth - 2) * config.width**2 + image_channels * config.width)
    return pixels * per_pixel + config.spatial**2 * 2 * config.channels * config.modulations


def parameter_count(config: FieldConfig, inner: InnerConfig, image_channels: int) -> int:
    """Weights, modulation map and rates, without building them."""
    w, c = config.width, config.channels
    siren = 2 * w + w + (config.depth - 2) * (w * w + w) + w * image_channels + image_channels
    rates = {"scalar": 1, "channel": c, "element": config.spatial**2 * c}[inner.rates]
    return siren + (c + 1) * config.modulations + rates
