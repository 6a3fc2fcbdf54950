"""The inner loop's mathematics (meta-SGD), as pure functions each of which one compiled graph can hold."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from functa.models.config import InnerConfig
from functa.models.field.field import Field
from functa.models.field.grid import Patches
from functa.models.field.passes import FirstStep, first_gradient, inner_gradient, patch_errors


@dataclass(frozen=True, eq=False)
class Shared:
    """All that the patches of a batch share beside the field: the first step, and rates [1 or K, 1 or s s, 1 or c]."""

    first: FirstStep
    rates: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All that a gradient flows through."""
        return self.first.output, self.first.jacobian, self.rates

    def leaves(self) -> "Shared":
        """Return a view of the same memory that collects gradients of its own."""
        output, jacobian, rates = (tensor.detach().requires_grad_() for tensor in self.tensors)
        return Shared(replace(self.first, output=output, jacobian=jacobian), rates)

    def rates_at(self, positions: Tensor) -> Tensor:
        """Return the rates of patches at these positions [N]: [1 or K, 1 or N, 1 or c]."""
        return self.rates[:, positions] if self.rates.shape[1] > 1 else self.rates

    def at(self, positions: Tensor) -> "Shared":
        """Return the share of patches at these positions [N]."""
        return Shared(self.first.at(positions), self.rates_at(positions))


def inner_step(z: Tensor, gradient: Tensor, rates: Tensor, inner: InnerConfig) -> Tensor:
    """Return latents [N, c] after one gradient step at rates broadcastable to [N, c]."""
    return z - rates * (gradient.detach() if inner.first_order else gradient)


def rates_of(rates: Tensor, number: int) -> Tensor:
    """Return the rates of an inner step, of [1 or K, ...]: further steps take those of the last."""
    return rates[min(number, len(rates) - 1)]


def start(patches: Patches, channels: int) -> Tensor:
    """Return the latents before the first step, zeros [N, c]."""
    return torch.zeros_like(patches.targets[:, 0, :1]).expand(-1, channels)


def loss_scale(patches: Patches, positions: int, inner: InnerConfig) -> float:
    """Return the factor before the sum of squared errors: the mean over the image, or over one patch (s^2 times that).

    `positions` are the latent positions of an image.
    """
    per_patch = 1 / patches.targets[0].numel()
    return per_patch if inner.loss == "patch" else per_patch / positions


def path(field: Field, shared: Shared, patches: Patches, inner: InnerConfig) -> list[Tensor]:
    """Return the latents [N, c] before the first inner step and after each: of whole images or independent patches."""
    scale = loss_scale(patches, field.config.positions, inner)
    z = [start(patches, field.config.channels)]
    for number in range(inner.steps):
        mixed, arguments = field.mix(z[-1])
        if number == 0 and shared.first.shared:
            gradient = first_gradient(field, shared.first, patches.targets, patches.weights, scale)
        else:
            taken = field.spread(mixed)
            gradient = inner_gradient(field, taken, patches.targets, patches.x, patches.weights, scale, inner.precision)
        gradient = field.pull_back(field.collect(gradient), arguments)
        z.append(inner_step(z[-1], gradient, rates_of(shared.rates, number), inner))
    return z


def encoded(field: Field, shared: Shared, patches: Patches, inner: InnerConfig) -> Tensor:
    """Return the latents [N, c] after the last inner step, of patches as in path."""
    return path(field, shared, patches, inner)[-1]


def encoded_by_step(field: Field, shared: Shared, patches: Patches, inner: InnerConfig) -> Tensor:
    """Return the latents before the first inner step and after each, [N, steps + 1, c], of patches as in path."""
    return torch.stack(path(field, shared, patches, inner), 1)


def encoded_errors(field: Field, shared: Shared, patches: Patches, inner: InnerConfig) -> Tensor:
    """Return the mean squared error [N] after the last inner step, of patches as in path."""
    return errors_at(field, encoded(field, shared, patches, inner), patches, inner.precision)


def errors_at(field: Field, z: Tensor, patches: Patches, precision: str) -> Tensor:
    """Return the mean squared error [N] at latents z [N, c], of patches as in path."""
    taken = field.spread(field.mix(z)[0])
    return patch_errors(field, taken, patches.targets, patches.x, patches.weights, precision)
