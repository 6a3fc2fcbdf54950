"""The neural field: a SIREN whose sine layers are shifted by modulations, and the map from latents to modulations."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from functa.models.config import FieldConfig, InnerConfig
from functa.models.field.cost import coordinate_inputs
from functa.models.field.grid import gather, interpolation_weights, neighbours, pixel_coordinates, scatter, unpatchify
from functa.models.field.mixer import Mixer

DECODE_PIXELS = 1 << 16  # decoded at a time: bounds memory

CACHED_PIXELS = 1 << 12  # on a CPU, whose caches then hold a layer: twice as fast


class Field(nn.Module):
    """Everything that all images share (paper section 4): SIREN weights, modulation map, meta-SGD rates.

    Layer i is sin(w0 (h W_i + b_i + m_i)); the first sine layer is modulated too; the output is linear, plus 0.5.
    Weights are stored [in, out], the map's taps one after the other: [k^2 c, C].
    `resolution` is that of the images to fit; binary coordinates alone cannot do without it (ValueError).
    """

    neighbours: Tensor | None

    def __init__(
        self,
        config: FieldConfig,
        inner: InnerConfig,
        image_channels: int,
        seed: int = 0,
        resolution: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.image_channels = image_channels
        self.resolution = None if resolution is None else tuple(resolution)
        generator = torch.Generator().manual_seed(seed)
        widths = [self._coordinate_width(), *[config.width] * (config.depth - 1), image_channels]
        bound = math.sqrt(6 / config.width) / config.w0  # SIREN; the first layer is 1 / inputs instead
        self.weights = nn.ParameterList(
            _uniform((m, n), 1 / m if i == 0 else bound, generator) for i, (m, n) in enumerate(pairwise(widths))
        )
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(n)) for n in widths[1:])
        inputs = config.kernel**config.axes * config.map_channels
        self.modulation_weight = nn.Parameter(torch.empty(inputs, config.modulations))
        nn.init.trunc_normal_(self.modulation_weight, a=-2, b=2, generator=generator)
        self.modulation_weight.data /= math.sqrt(inputs)  # truncated at two of the *final* deviations
        self.modulation_bias = nn.Parameter(torch.zeros(config.modulations))
        shape = {"scalar": (), "channel": (config.channels,), "element": config.latent_shape}[inner.rates]
        low, high = inner.rates_init
        rates = torch.empty(shape).uniform_(low, high, generator=generator)
        self.rates = nn.Parameter(rates.expand(inner.steps, *shape).clone() if inner.rates_per_step else rates)
        self.mixer = Mixer(config, generator) if config.mixer else None
        self.register_buffer("neighbours", neighbours(config), persistent=False)

    def _coordinate_width(self) -> int:
        if self.config.coordinates == "binary" and self.resolution is None:
            raise ValueError("binary coordinates have as many bits as the images' sides need: give Field a resolution")
        return coordinate_inputs(self.config, self.resolution or ())

    def mix(self, z: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Latents [N, c] -> what the map takes of every position [N, w], and what pull_back needs of that."""
        return (z, []) if self.mixer is None else self.mixer.with_arguments(z)

    def pull_back(self, cotangent: Tensor, arguments: list[Tensor]) -> Tensor:
        """Cotangent [N, w] of what mix returned -> of the latents [N, c]."""
        return cotangent if self.mixer is None else self.mixer.pull_back(cotangent, arguments)

    def spread(self, mixed: Tensor) -> Tensor:
        """Inputs of the map at every position [N, w] -> of every patch with its neighbours', [N, K, k^2 w]."""
        if self.neighbours is None:  # some patches of an image may be all there are
            return mixed[:, None]
        return gather(mixed.reshape(-1, self.config.positions, mixed.shape[-1]), self.neighbours, self.config)

    def collect(self, spread: Tensor) -> Tensor:
        """The adjoint of spread: [N, K, k^2 w] -> [N, w]."""
        if self.neighbours is None:
            return spread[:, 0]
        batch = len(spread) // self.config.positions
        return scatter(spread, self.neighbours, batch, self.config.map_channels).flatten(0, 1)

    def modulate(self, z: Tensor) -> list[Tensor]:
        """Latents or what the mixer made of them [..., k^2 c] -> one shift [..., W] per sine layer."""
        m = z @ self.modulation_weight + self.modulation_bias  # [..., C]
        return list(m.split(self.config.width, dim=-1))

    def check_resolution(self, resolution: Sequence[int]) -> None:
        """Raises ValueError where the field cannot be evaluated at this resolution."""
        if self.config.coordinates == "binary" and tuple(resolution) != self.resolution:
            fitted = "x".join(map(str, self.resolution or ()))
            raise ValueError(
                f"a field of binary coordinates exists at the resolution it was fitted on alone, {fitted}, "
                f"not {'x'.join(map(str, resolution))}: decode it there, or train with field.coordinates=global"
            )

    def forward(self, z: Tensor, resolution: Sequence[int]) -> Tensor:
        """Latents [B, s, s, c] -> images [B, H, W, ch], unclamped, at any resolution that s divides (ValueError)."""
        self.check_resolution(resolution)
        x = pixel_coordinates(self.config, resolution, z)  # [1 or s s, P, in]
        weights = interpolation_weights(self.config, resolution, z)  # [P, K]
        patches = self.spread(self.mix(z.flatten(0, -2))[0])
        positions = torch.arange(len(patches), device=z.device) % len(x)
        most = DECODE_PIXELS if z.is_cuda else min(DECODE_PIXELS, CACHED_PIXELS)
        size = max(1, most // x.shape[1])  # activations are [size, P, W]
        parts = [
            self._in_parts(part, x if len(x) == 1 else x[rows], weights)
            for part, rows in zip(patches.split(size), positions.split(size))
        ]
        return unpatchify(torch.cat(parts), self.config.spatial, resolution)

    def _in_parts(self, z: Tensor, x: Tensor, weights: Tensor | None) -> Tensor:
        """Return the same as `patches`, taking the pixels of a large patch a part at a time."""
        splits = x.split(DECODE_PIXELS, 1)
        mixed = [None] * len(splits) if weights is None else weights.split(DECODE_PIXELS)
        return torch.cat([self.patches(z, part, w) for part, w in zip(splits, mixed)], 1)

    def patches(self, z: Tensor, x: Tensor, weights: Tensor | None) -> Tensor:
        """Latents [N, K, k^2 c] at pixel coordinates x [N, P, in], interpolated by weights [P, K] -> [N, P, ch]."""
        h = x
        for weight, bias, shift in zip(self.weights, self.biases, self.modulate(z)):
            at_pixels = shift if weights is None else weights @ shift  # [N, 1 or P, W]
            h = torch.sin(self.config.w0 * (h @ weight + bias + at_pixels))  # [N, P, W]
        return h @ self.weights[-1] + self.biases[-1] + 0.5


def _uniform(shape: tuple[int, int], bound: float, generator: torch.Generator) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=generator))
