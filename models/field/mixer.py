"""Convolutions over the latent grid between the latents and the map, so that a patch sees its neighbours' latents.

Nothing of it is the paper's. It costs work per latent position, not per pixel. It has no biases, so that it maps zero
to zero and the first inner step stays the same for all images and patches.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from functa.models.config import FieldConfig

SIDE = 3  # of every kernel; beyond the border lies zero


class Mixer(nn.Module):
    """A convolution c -> w, then residual blocks x + B silu(A x) of two convolutions w -> w each.

    Weights are stored [9 in, out] as the map's are. The last of a block starts from zero: at first a mixer is linear.
    """

    def __init__(self, config: FieldConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.axes, self.spatial = config.axes, config.spatial
        widths = [config.channels, *[config.mixer_width] * (2 * config.mixer + 1)]
        taps = SIDE**config.axes
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(taps * m, n)) for m, n in pairwise(widths))
        for number, weight in enumerate(self.weights):
            nn.init.trunc_normal_(weight, a=-2, b=2, generator=generator)
            weight.data *= 0 if number and number % 2 == 0 else len(weight) ** -0.5

    def forward(self, z: Tensor) -> Tensor:
        """Latents [N, c], image by image -> what the map takes, [N, w]."""
        return self.with_arguments(z)[0]

    def with_arguments(self, z: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return also the arguments of the blocks' SiLUs, which pull_back takes."""
        h = self._convolve(self._to_grid(z), self.weights[0])
        arguments = []
        for first, last in zip(self.weights[1::2], self.weights[2::2]):
            arguments.append(self._convolve(h, first))
            h = h + self._convolve(F.silu(arguments[-1]), last)
        return self._to_rows(h), arguments

    def pull_back(self, cotangent: Tensor, arguments: list[Tensor]) -> Tensor:
        """Cotangent [N, w] of what forward returned -> of the latents, [N, c]."""
        g = self._to_grid(cotangent)
        for number in reversed(range(len(arguments))):
            first, last = self.weights[1 + 2 * number], self.weights[2 + 2 * number]
            sigmoid = torch.sigmoid(arguments[number])
            slope = sigmoid * (1 + arguments[number] * (1 - sigmoid))
            g = g + self._adjoint(slope * self._adjoint(g, last), first)
        return self._to_rows(self._adjoint(g, self.weights[0]))

    def _convolve(self, h: Tensor, weight: Tensor) -> Tensor:
        return self._convolution(h, self._kernel(weight).movedim(-1, 0).movedim(-1, 1))

    def _adjoint(self, g: Tensor, weight: Tensor) -> Tensor:
        """Return the convolution's adjoint: one with the kernel turned round, from outputs to inputs."""
        return self._convolution(g, self._kernel(weight).flip(tuple(range(self.axes))).movedim(-2, 0).movedim(-1, 1))

    def _convolution(self, h: Tensor, kernel: Tensor) -> Tensor:
        return (F.conv1d, F.conv2d, F.conv3d)[self.axes - 1](h, kernel, padding=SIDE // 2)

    def _kernel(self, weight: Tensor) -> Tensor:
        """[9 in, out] -> [3, 3, in, out]."""
        return weight.reshape(*[SIDE] * self.axes, -1, weight.shape[1])

    def _to_grid(self, rows: Tensor) -> Tensor:
        """[B s s, c] -> [B, c, s, s]."""
        return rows.reshape(-1, *[self.spatial] * self.axes, rows.shape[-1]).movedim(-1, 1)

    def _to_rows(self, grid: Tensor) -> Tensor:
        return grid.movedim(1, -1).flatten(0, -2)
