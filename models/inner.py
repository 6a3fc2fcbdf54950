"""The inner loop: three gradient steps on every latent from zero, differentiable, and the outer loss through them.

The gradient of the inner loss is written out (forward, then the chain rule back to the shifts) so that the whole
step is one graph without nested autograd. Two exact savings over the plain loop:

- The first step starts from zero for every image and patch, so f(0) and its Jacobian are computed once for one
  patch; what remains of the step is a [P ch, c] matmul per patch. With K = 3 steps 4 of 6 passes remain.
- With a 1x1 map and nearest interpolation patches are independent, so they are taken in chunks whose activations
  stay in cache; nothing grows with the image or the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from models.config import InnerConfig
from models.field import Field
from models.grid import patch_coordinates, patch_shape, patchify


@dataclass(frozen=True)
class FirstStep:
    """What the first inner step of every patch shares: f(x; m(0)) [P, ch] and d f / d z at zero [P ch, c]."""

    output: Tensor
    jacobian: Tensor


def matmul(h: Tensor, weight: Tensor, precision: str) -> Tensor:
    """h [..., m] @ weight [m, n] with the operands in `precision`; the result is float32."""
    if precision == "bf16":
        return (h.bfloat16() @ weight.bfloat16()).float()
    return h @ weight


def loss_scale(inner: InnerConfig, spatial: int, patch: tuple[int, int], channels: int) -> float:
    """Factor before the sum of squared errors of one patch: the mean over the image, or over the patch."""
    per_patch = 1 / (patch[0] * patch[1] * channels)
    return per_patch if inner.loss == "patch" else per_patch / spatial**2


def forward(field: Field, z: Tensor, x: Tensor, precision: str) -> tuple[Tensor, list[Tensor]]:
    """z [N, c], x [P, 2] -> output [N, P, ch] and the cosine of every sine layer's argument, [N, P, W] each."""
    shifts = field.modulate(z)
    cosines: list[Tensor] = []
    h = x
    for i, shift in enumerate(shifts):
        # The first layer's matmul is shared by all patches: [P, W], then one shift per patch.
        h = h @ field.weights[0] if i == 0 else matmul(h, field.weights[i], precision)
        argument = field.config.w0 * (h + field.biases[i] + shift[:, None])  # [N, P, W]
        h, cosine = torch.sin(argument), torch.cos(argument)
        cosines.append(cosine)
    return h @ field.weights[-1] + field.biases[-1] + 0.5, cosines


def pull_back(field: Field, cotangent: Tensor, cosines: list[Tensor], precision: str) -> list[Tensor]:
    """Cotangent of the output [N, P, ch] -> of every layer's argument before w0, [N, P, W], first layer first."""
    g = cotangent @ field.weights[-1].T
    pulled: list[Tensor] = []
    for i in reversed(range(len(cosines))):
        g = field.config.w0 * g * cosines[i]
        pulled.append(g)
        if i:
            g = matmul(g, field.weights[i].T, precision)
    return pulled[::-1]


def inner_gradient(field: Field, z: Tensor, targets: Tensor, x: Tensor, scale: float, precision: str) -> Tensor:
    """Gradient of scale * sum((f - t)^2) by z: z [N, c], targets [N, P, ch] -> [N, c]."""
    output, cosines = forward(field, z, x, precision)
    pulled = pull_back(field, 2 * scale * (output - targets), cosines, precision)
    shifts = torch.cat([g.sum(1) for g in pulled], dim=-1)  # [N, C]: a shift is constant over its patch
    return shifts @ field.modulation_weight.T


def first_step(field: Field, x: Tensor, precision: str) -> FirstStep:
    """f and its Jacobian at z = 0, from one patch: one forward pass and one backward pass per image channel."""
    zero = x.new_zeros(1, field.config.channels)
    output, cosines = forward(field, zero, x, precision)  # [1, P, ch]
    channels = output.shape[-1]
    one_hot = torch.eye(channels, dtype=x.dtype, device=x.device)[:, None].expand(channels, x.shape[0], channels)
    pulled = pull_back(field, one_hot, cosines, precision)  # [ch, P, W] each: a pixel's output sees only its own shift
    by_shift = torch.cat(pulled, dim=-1).transpose(0, 1).flatten(0, 1)  # [P ch, C]
    return FirstStep(output[0], by_shift @ field.modulation_weight.T)


def encode_patches(
    field: Field, first: FirstStep, targets: Tensor, rates: Tensor, x: Tensor, inner: InnerConfig, scale: float
) -> Tensor:
    """Targets [N, P, ch] and rates (broadcastable to [N, c]) -> latents after inner.steps steps, [N, c]."""
    residual = (first.output - targets).flatten(1)  # [N, P ch]
    z = -rates * (2 * scale * residual @ first.jacobian)
    for _ in range(inner.steps - 1):
        z = z - rates * inner_gradient(field, z, targets, x, scale, inner.precision)
    return z


def patch_errors(
    field: Field, first: FirstStep, targets: Tensor, rates: Tensor, x: Tensor, inner: InnerConfig, scale: float
) -> Tensor:
    """Mean squared error of every patch after the inner loop: [N]. The outer loss is its mean over all patches."""
    z = encode_patches(field, first, targets, rates, x, inner, scale)
    output, _ = forward(field, z, x, inner.precision)
    return (output - targets).square().mean((1, 2))


@dataclass(frozen=True)
class InnerLoop:
    """The inner loop of one field at one resolution; `compiled` wraps its two hot functions in torch.compile."""

    field: Field
    inner: InnerConfig
    resolution: tuple[int, int]
    compiled: bool = False

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, H, W, ch] in [0, 1] -> latents [B, s, s, c] (paper section 4)."""
        with torch.no_grad():
            z = self._over_chunks(encode_patches, images, self._first(images), self._rates(len(images)))
        return z.reshape(len(images), *self.field.config.latent_shape)

    def errors(self, images: Tensor) -> Tensor:
        """Squared error of each image after the inner loop, [B], without gradients."""
        with torch.no_grad():
            errors = self._over_chunks(patch_errors, images, self._first(images), self._rates(len(images)))
        return errors.reshape(len(images), -1).mean(1)

    def outer_backward(self, images: Tensor) -> Tensor:
        """Adds the gradient of the outer loss to every shared parameter; returns each image's squared error [B].

        The loss is the mean squared error after the last inner step, differentiated through all of them (second
        order). Chunk by chunk: the graph of one chunk is freed before the next is built. What the chunks share (the
        first step, the rates) is differentiated once, from the sum of the chunks' cotangents.
        """
        first, rates = self._first(images), self._rates(len(images))
        shared = (first.output, first.jacobian, rates)
        output, jacobian, leaf_rates = (t.detach().requires_grad_() for t in shared)
        weight = 1 / (len(images) * self.field.config.spatial**2)  # the loss is the mean over patches
        errors = self._over_chunks(
            patch_errors, images, FirstStep(output, jacobian), leaf_rates, then=lambda e: (weight * e.sum()).backward()
        )
        cotangents = [cast(Tensor, t.grad) for t in (output, jacobian, leaf_rates)]
        torch.autograd.backward(shared, cotangents)
        return errors.reshape(len(images), -1).mean(1)

    def _over_chunks(
        self,
        function: Callable[..., Tensor],
        images: Tensor,
        first: FirstStep,
        rates: Tensor,
        then: Callable[[Tensor], None] = lambda _: None,
    ) -> Tensor:
        """The hot function over equal chunks of patches: equal, so that one compiled graph serves all."""
        targets = patchify(images, self.field.config.spatial)  # [N, P, ch]
        size = chunk_patches(len(targets), self.inner.chunk, targets.shape[1])
        run = _compiled(function) if self.compiled else function
        x = self._coordinates(images)
        done: list[Tensor] = []
        for start in range(0, len(targets), size):
            chunk_rates = rates if rates.dim() < 2 else rates[start : start + size]
            value = run(self.field, first, targets[start : start + size], chunk_rates, x, self.inner, self._scale)
            then(value)
            done.append(value.detach())
        return torch.cat(done)

    @property
    def _patch(self) -> tuple[int, int]:
        return patch_shape(self.resolution, self.field.config.spatial)

    @property
    def _scale(self) -> float:
        return loss_scale(self.inner, self.field.config.spatial, self._patch, self.field.image_channels)

    def _first(self, images: Tensor) -> FirstStep:
        return first_step(self.field, self._coordinates(images), self.inner.precision)

    def _coordinates(self, images: Tensor) -> Tensor:
        return patch_coordinates(self._patch, images)

    def _rates(self, batch: int) -> Tensor:
        """(), [c], or one row per patch [B s s, c]; clipped if so configured."""
        rates: Tensor = self.field.rates
        if self.inner.rates_clip is not None:
            rates = rates.clamp(*self.inner.rates_clip)
        return rates.reshape(-1, rates.shape[-1]).repeat(batch, 1) if rates.dim() == 3 else rates


_COMPILED: dict[Callable[..., Tensor], Callable[..., Tensor]] = {}


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    if function not in _COMPILED:
        _COMPILED[function] = torch.compile(function, dynamic=False, fullgraph=True)
    return _COMPILED[function]


def chunk_patches(patches: int, pixels: int, patch_pixels: int) -> int:
    """Patches per chunk: the largest divisor of `patches` whose pixels number at most `pixels` (at least 1)."""
    limit = max(1, pixels // patch_pixels)
    return next(n for n in range(min(limit, patches), 0, -1) if patches % n == 0)


def decode(field: Field, z: Tensor, resolution: tuple[int, int]) -> Tensor:
    """Latents [B, s, s, c] -> images [B, H, W, ch] clamped to [0, 1], for eyes and downstream measures, not PSNR."""
    with torch.no_grad():
        return field(z, resolution).clamp(0, 1)
