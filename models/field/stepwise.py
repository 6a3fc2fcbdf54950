"""The inner loop step by step over all patches: for fields whose patches depend on each other, and for little memory.

Every inner step goes over all chunks before the next one begins. The outer gradient walks back through the steps, of
which only the latents were kept: each chunk's activations are computed again when their turn comes (activation
checkpointing; 19 passes), so that memory holds one chunk's graph, whatever the size of image and batch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from functa.models.compute.compilation import compiled
from functa.models.config import InnerConfig
from functa.models.field.field import Field
from functa.models.field.grid import Patches
from functa.models.field.inner_step import Shared, inner_step, loss_scale, rates_of, start
from functa.models.field.passes import FirstStep, first_gradient, inner_gradient, patch_errors


@dataclass(frozen=True, eq=False)
class Stepwise:
    """The engine of InnerLoop for any field."""

    field: Field
    inner: InnerConfig
    compiled: bool

    def latents(self, patches: Patches, shared: Shared) -> Tensor:
        return self._steps(patches, shared)[0][-1]

    def by_step(self, patches: Patches, shared: Shared) -> Tensor:
        return torch.stack(self._steps(patches, shared)[0])

    def errors(self, patches: Patches, shared: Shared) -> Tensor:
        return self._errors(patches, self.latents(patches, shared), self.inner.precision)

    def errors_at(self, patches: Patches, z: Tensor) -> Tensor:
        return self._errors(patches, z, "float32")

    def backward(self, patches: Patches, shared: Shared) -> tuple[Tensor, list[Tensor | None]]:
        leaves = shared.leaves()
        path, gradients = self._steps(patches, shared)
        errors, cotangent = self._errors_back(patches, path[-1])
        for number in reversed(range(self.inner.steps)):
            step = -rates_of(leaves.rates_at(patches.positions), number) * cotangent  # of the gradient, [N, c]
            (step * self._pulled_back(path[number], gradients[number])).sum().backward()
            if not self.inner.first_order:
                step = step.detach()
                cotangent = cotangent + self._step_back(patches, number, path, gradients[number], step, leaves.first)
        return errors, [tensor.grad for tensor in leaves.tensors]

    def _steps(self, patches: Patches, shared: Shared) -> tuple[list[Tensor], list[Tensor]]:
        """Return the latents [N, c] before the first step and after each, and each step's gradient by mixed latents."""
        rates = shared.rates_at(patches.positions)
        path, gradients = [start(patches, self.field.config.channels)], []
        with torch.no_grad():
            for number in range(self.inner.steps):
                mixed, arguments = self.field.mix(path[-1])
                z = self.field.spread(mixed)
                parts = [self._gradient(number, z[rows], chunk, shared.first) for rows, chunk in self._chunks(patches)]
                gradients.append(self.field.collect(torch.cat(parts)))
                gradient = self.field.pull_back(gradients[-1], arguments)
                path.append(inner_step(path[-1], gradient, rates_of(rates, number), self.inner))
        return path, gradients

    def _pulled_back(self, z: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient by the latents z, from the gradient by what mix makes of them."""
        with torch.no_grad():
            return self.field.pull_back(gradient, self.field.mix(z)[1])

    def _errors(self, patches: Patches, z: Tensor, precision: str) -> Tensor:
        with torch.no_grad():
            z = self.field.spread(self.field.mix(z)[0])
            return torch.cat([self._error(z[rows], chunk, precision) for rows, chunk in self._chunks(patches)])

    def _errors_back(self, patches: Patches, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the errors [N] and the gradient of their sum by z, differentiated chunk by chunk."""
        z = z.detach().requires_grad_()
        mixed = self.field.mix(z)[0]
        spread = self.field.spread(mixed.detach()).requires_grad_()
        errors = []
        for rows, chunk in self._chunks(patches):
            error = self._error(spread[rows], chunk, self.inner.precision)
            error.sum().backward()
            errors.append(error.detach())
        mixed.backward(self.field.collect(cast(Tensor, spread.grad)))
        return torch.cat(errors), cast(Tensor, z.grad)

    def _step_back(
        self, patches: Patches, number: int, path: list[Tensor], gradient: Tensor, cotangent: Tensor, first: FirstStep
    ) -> Tensor:
        """Pull the cotangent of an inner step's gradient by the latents back to the latents before it, [N, c]."""
        z, gradient = path[number].detach().requires_grad_(), gradient.detach().requires_grad_()
        mixed, arguments = self.field.mix(z)
        value = (self.field.pull_back(gradient, arguments) * cotangent).sum()
        (pulled,) = torch.autograd.grad(value, gradient, retain_graph=True)
        pulled = self._gradient_back(patches, number, mixed.detach(), pulled, first)
        (value + (mixed * pulled).sum()).backward()
        return cast(Tensor, z.grad)

    def _gradient_back(
        self, patches: Patches, number: int, mixed: Tensor, cotangent: Tensor, first: FirstStep
    ) -> Tensor:
        """Pull the cotangent of a gradient by what the map takes back to that, [N, w]."""
        spread = self.field.spread(mixed).requires_grad_()
        pulled = self.field.spread(cotangent)  # the adjoint of the collect that made the gradient
        for rows, chunk in self._chunks(patches):
            (self._gradient(number, spread[rows], chunk, first) * pulled[rows]).sum().backward()
        return torch.zeros_like(mixed) if spread.grad is None else self.field.collect(spread.grad)

    def _chunks(self, patches: Patches) -> Iterator[tuple[slice, Patches]]:
        return patches.chunks(self.inner.chunk)

    def _gradient(self, number: int, z: Tensor, chunk: Patches, first: FirstStep) -> Tensor:
        """Return the gradient of a chunk's inner loss by what spread made of it [n, K, T w]; step 0 may be shared."""
        scale = loss_scale(chunk, self.field.config.positions, self.inner)
        if number == 0 and first.shared:
            return first_gradient(self.field, first.at(chunk.positions), chunk.targets, chunk.weights, scale)
        call = self._compiled(inner_gradient)
        return call(self.field, z, chunk.targets, chunk.x, chunk.weights, scale, self.inner.precision)

    def _error(self, z: Tensor, chunk: Patches, precision: str) -> Tensor:
        return self._compiled(patch_errors)(self.field, z, chunk.targets, chunk.x, chunk.weights, precision)

    def _compiled(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return compiled(function, self.field.modulation_weight.device.type) if self.compiled else function
