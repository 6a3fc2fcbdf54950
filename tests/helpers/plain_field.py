"""The method as the paper writes it: modulations at every pixel, autograd inside autograd. It is slow and short, and
shares nothing with models/ but the parameters."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from functa.models.config import InnerConfig
from functa.models.field.field import Field


def coordinates(field: Field, resolution: tuple[int, ...]) -> Tensor:
    """Return [H, W, width], computed pixel by pixel."""
    config, rows = field.config, []
    for pixel in itertools.product(*map(range, resolution)):
        if config.coordinates == "binary":
            bits = "".join(f"{i:0{side.bit_length() - 1}b}" for i, side in zip(pixel, resolution))
            rows.append([float(bit) for bit in bits])
        else:
            sides = [n // config.spatial for n in resolution] if config.coordinates == "patch" else resolution
            rows.append([(i % side + 0.5) / side for i, side in zip(pixel, sides)])
    return torch.tensor(rows, dtype=field.rates.dtype).reshape(*resolution, -1)


def modulations(field: Field, z: Tensor, resolution: tuple[int, ...]) -> Tensor:
    """Latents [B, s, s, c] -> [B, H, W, C]: a convolution, then torch's own interpolation."""
    config, axes = field.config, field.config.axes
    h = z.movedim(-1, 1)
    if config.mixer:
        first, *blocks = [_kernel(weight, 3, axes) for weight in field.mixer.weights]
        h = _convolve(h, first)
        for one, two in zip(blocks[::2], blocks[1::2]):
            h = h + _convolve(F.silu(_convolve(h, one)), two)
    m = _convolve(h, _kernel(field.modulation_weight, config.kernel, axes), field.modulation_bias)
    if config.interpolation == "nearest":
        m = F.interpolate(m, resolution, mode="nearest-exact")
    else:
        m = F.interpolate(m, resolution, mode=("linear", "bilinear", "trilinear")[axes - 1], align_corners=False)
    return m.movedim(1, -1)


def _kernel(weight: Tensor, side: int, axes: int) -> Tensor:
    return weight.reshape(*[side] * axes, -1, weight.shape[1]).movedim((-1, -2), (0, 1))


def _convolve(h: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    return (F.conv1d, F.conv2d, F.conv3d)[h.dim() - 3](h, kernel, bias, padding="same")


def reconstruct(field: Field, z: Tensor, resolution: tuple[int, ...]) -> Tensor:
    """Latents [B, s, s, c] -> images [B, H, W, ch]."""
    h = coordinates(field, resolution)
    shifts = modulations(field, z, resolution).split(field.config.width, -1)
    for weight, bias, shift in zip(field.weights, field.biases, shifts):
        h = torch.sin(field.config.w0 * (h @ weight + bias + shift))
    return h @ field.weights[-1] + field.biases[-1] + 0.5


def inner_loss(field: Field, z: Tensor, images: Tensor, inner: InnerConfig) -> Tensor:
    """Sum over images of the mean squared error, so that an image's gradient does not depend on the batch."""
    error = (reconstruct(field, z, tuple(images.shape[1:-1])) - images).square().flatten(1).mean(1).sum()
    return error * (field.config.positions if inner.loss == "patch" else 1)


def encode(field: Field, images: Tensor, inner: InnerConfig) -> Tensor:
    z = torch.zeros(len(images), *field.config.latent_shape, dtype=images.dtype, requires_grad=True)
    rates = field.rates if inner.rates_clip is None else field.rates.clamp(*inner.rates_clip)
    for number in range(inner.steps):
        (gradient,) = torch.autograd.grad(inner_loss(field, z, images, inner), z, create_graph=not inner.first_order)
        z = z - (rates[number] if inner.rates_per_step else rates) * gradient
    return z


def outer_loss(field: Field, images: Tensor, inner: InnerConfig) -> Tensor:
    return (reconstruct(field, encode(field, images, inner), tuple(images.shape[1:-1])) - images).square().mean()
