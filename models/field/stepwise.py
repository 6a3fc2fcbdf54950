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
from functa.models.field.grid import Patches, gather, neighbours, scatter
from functa.models.field.inner_step import Shared, inner_step, loss_scale, start
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
            step = -leaves.rates_at(patches.positions) * cotangent  # of the gradient, [N, c]
            (step * gradients[number]).sum().backward()
            if not self.inner.first_order:
                cotangent = cotangent + self._gradient_back(patches, number, path[number], step.detach(), leaves.first)
        return errors, [tensor.grad for tensor in leaves.tensors]

    def _steps(self, patches: Patches, shared: Shared) -> tuple[list[Tensor], list[Tensor]]:
        """Return the latents [N, c] before the first step and after each, and every step's gradient."""
        rates = shared.rates_at(patches.positions)
        path, gradients = [start(patches, self.field.config.channels)], []
        with torch.no_grad():
            for number in range(self.inner.steps):
                z = self._gather(path[-1])
                parts = [self._gradient(number, z[rows], chunk, shared.first) for rows, chunk in self._chunks(patches)]
                gradients.append(self._scatter(torch.cat(parts)))
                path.append(inner_step(path[-1], gradients[-1], rates, self.inner))
        return path, gradients

    def _errors(self, patches: Patches, z: Tensor, precision: str) -> Tensor:
        with torch.no_grad():
            z = self._gather(z)
            return torch.cat([self._error(z[rows], chunk, precision) for rows, chunk in self._chunks(patches)])

    def _errors_back(self, patches: Patches, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the errors [N] and the gradient of their sum by z, differentiated chunk by chunk."""
        gathered = self._gather(z).requires_grad_()
        errors = []
        for rows, chunk in self._chunks(patches):
            error = self._error(gathered[rows], chunk, self.inner.precision)
            error.sum().backward()
            errors.append(error.detach())
        return torch.cat(errors), self._scatter(cast(Tensor, gathered.grad))

    def _gradient_back(self, patches: Patches, number: int, z: Tensor, cotangent: Tensor, first: FirstStep) -> Tensor:
        """Pull the cotangent of an inner step's gradient back to the latents before it, [N, c]."""
        gathered = self._gather(z).detach().requires_grad_()
        pulled = self._gather(cotangent)  # gather is the adjoint of the scatter that made the gradient
        for rows, chunk in self._chunks(patches):
            (self._gradient(number, gathered[rows], chunk, first) * pulled[rows]).sum().backward()
        return torch.zeros_like(z) if gathered.grad is None else self._scatter(gathered.grad)

    def _chunks(self, patches: Patches) -> Iterator[tuple[slice, Patches]]:
        return patches.chunks(self.inner.chunk)

    def _gradient(self, number: int, z: Tensor, chunk: Patches, first: FirstStep) -> Tensor:
        """Return the gradient of a chunk's inner loss by its gathered latents [n, K, T c]; step 0 may be shared."""
        scale = loss_scale(chunk, self.field.config.positions, self.inner)
        if number == 0 and first.shared:
            return first_gradient(self.field, first.at(chunk.positions), chunk.targets, chunk.weights, scale)
        call = self._compiled(inner_gradient)
        return call(self.field, z, chunk.targets, chunk.x, chunk.weights, scale, self.inner.precision)

    def _error(self, z: Tensor, chunk: Patches, precision: str) -> Tensor:
        return self._compiled(patch_errors)(self.field, z, chunk.targets, chunk.x, chunk.weights, precision)

    def _compiled(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return compiled(function, self.field.modulation_weight.device.type) if self.compiled else function

    def _gather(self, z: Tensor) -> Tensor:
        config, index = self.field.config, neighbours(self.field.config)
        if index is None:  # some patches of an image may be all there are
            return z[:, None]
        return gather(z.reshape(-1, config.positions, config.channels), index, config)

    def _scatter(self, gathered: Tensor) -> Tensor:
        config, index = self.field.config, neighbours(self.field.config)
        if index is None:
            return gathered[:, 0]
        return scatter(gathered, index, len(gathered) // config.positions, config.channels).flatten(0, 1)
