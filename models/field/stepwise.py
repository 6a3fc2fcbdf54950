"""The inner loop step by step over all patches: for fields whose patches depend on each other, and for little memory.

Every inner step goes over all chunks before the next one begins. The outer gradient walks back through the steps, of
which only the latents were kept: each chunk's activations are computed again when their turn comes (activation
checkpointing), so that memory holds one chunk's graph, whatever the size of image and batch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from functa.models.config import InnerConfig
from functa.models.field.field import Field
from functa.models.field.grid import Patches, at, gather, neighbours, scatter
from functa.models.field.passes import FirstStep, first_gradient, inner_gradient, patch_errors

Run = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]


@dataclass(frozen=True, eq=False)
class Sweep:
    """One batch's patches under one field. Latents are [N, c] here; `run` compiles a function or leaves it."""

    field: Field
    inner: InnerConfig
    patches: Patches
    scale: float
    run: Run

    def latents(self, first: FirstStep, rates: Tensor, steps: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """Latents after all inner steps, without a graph; `steps` receives every step's (latents, gradient)."""
        rates = at(rates, self.patches.positions)
        z = torch.zeros_like(self.patches.targets[:, 0, :1]).expand(-1, self.field.config.channels)
        with torch.no_grad():
            for number in range(self.inner.steps):
                gathered = self._gather(z)
                parts = [self._gradient(number, gathered[rows], chunk, first) for rows, chunk in self._chunks()]
                gradient = self._scatter(torch.cat(parts))
                if steps is not None:
                    steps.append((z, gradient))
                z = z - rates * gradient
        return z

    def errors(self, z: Tensor, precision: str | None = None) -> Tensor:
        """Mean squared error [N] of every patch at latents z, without a graph; in another precision if asked for."""
        with torch.no_grad():
            gathered = self._gather(z)
            return torch.cat([self._errors(gathered[rows], chunk, precision) for rows, chunk in self._chunks()])

    def backward(self, first: FirstStep, rates: Tensor) -> Tensor:
        """Adds the gradient of the sum of all errors to the field's parameters, `first` and `rates` (leaves).

        Returns the errors [N].
        """
        steps: list[tuple[Tensor, Tensor]] = []
        z = self.latents(first, rates.detach(), steps)
        errors, cotangent = self._errors_back(z)
        for number in reversed(range(self.inner.steps)):
            before, gradient = steps[number]
            step = -at(rates, self.patches.positions) * cotangent  # of the gradient, [N, c]
            (step * gradient).sum().backward()
            if not self.inner.first_order:
                cotangent = cotangent + self._gradient_back(number, before, step.detach(), first)
        return errors

    def _errors_back(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(errors [N], the cotangent of z), the sum of errors differentiated chunk by chunk."""
        gathered = self._gather(z).requires_grad_()
        errors = []
        for rows, chunk in self._chunks():
            error = self._errors(gathered[rows], chunk)
            error.sum().backward()
            errors.append(error.detach())
        return torch.cat(errors), self._scatter(cast(Tensor, gathered.grad))

    def _gradient_back(self, number: int, z: Tensor, cotangent: Tensor, first: FirstStep) -> Tensor:
        """Pulls the cotangent of an inner step's gradient back to the latents before it, [N, c]."""
        gathered = self._gather(z).detach().requires_grad_()
        pulled = self._gather(cotangent)  # gather is the adjoint of the scatter that made the gradient
        for rows, chunk in self._chunks():
            (self._gradient(number, gathered[rows], chunk, first) * pulled[rows]).sum().backward()
        return torch.zeros_like(z) if gathered.grad is None else self._scatter(gathered.grad)

    def _chunks(self) -> Iterator[tuple[slice, Patches]]:
        return self.patches.chunks(self.inner.chunk)

    def _gradient(self, number: int, z: Tensor, chunk: Patches, first: FirstStep) -> Tensor:
        """Of a chunk's inner loss by its gathered latents [n, K, T c]; step 0 may be the shared one."""
        if number == 0 and first.shared:
            return first_gradient(self.field, first.at(chunk.positions), chunk.targets, chunk.weights, self.scale)
        run = self.run(inner_gradient)
        return run(self.field, z, chunk.targets, chunk.x, chunk.weights, self.scale, self.inner.precision)

    def _errors(self, z: Tensor, chunk: Patches, precision: str | None = None) -> Tensor:
        run = self.run(patch_errors)
        return run(self.field, z, chunk.targets, chunk.x, chunk.weights, precision or self.inner.precision)

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
