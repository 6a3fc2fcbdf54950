"""The inner loop chunk by chunk: a chunk runs all steps as one graph, one chunk on every core.

A chunk is of independent patches, or of whole images where patches depend on each other. Nothing but pixels and latents
grows with the batch; memory holds the graph of one chunk per core.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from functa.models.compute.parallel import Cores
from functa.models.config import InnerConfig
from functa.models.field.field import Field
from functa.models.field.grid import Patches
from functa.models.field.inner_step import Shared, encoded, encoded_by_step, encoded_errors, errors_at

Part = tuple[slice, Patches]  # rows of a batch's patches, and the chunk of them


@dataclass(frozen=True, eq=False)
class Chunkwise:
    """The engine of InnerLoop where a chunk depends on nothing beyond it."""

    field: Field
    inner: InnerConfig
    compiled: bool

    def latents(self, patches: Patches, shared: Shared) -> Tensor:
        return self._over_chunks(encoded, patches, self._same(shared))

    def by_step(self, patches: Patches, shared: Shared) -> Tensor:
        return self._over_chunks(encoded_by_step, patches, self._same(shared)).transpose(0, 1)

    def errors(self, patches: Patches, shared: Shared) -> Tensor:
        return self._over_chunks(encoded_errors, patches, self._same(shared))

    def errors_at(self, patches: Patches, z: Tensor) -> Tensor:
        def arguments(core: int, part: Part) -> tuple[Any, ...]:
            rows, chunk = part
            return self._fields[core], z[rows], chunk, "float32"

        return self._run(errors_at, patches, arguments)

    def backward(self, patches: Patches, shared: Shared) -> tuple[Tensor, list[Tensor | None]]:
        leaves = [shared.leaves() for _ in self._fields]
        errors = self._over_chunks(encoded_errors, patches, leaves)
        for own, *views in zip(*(field.parameters() for field in self._fields)):
            own.grad = _summed_gradient([own, *views])
            for view in views:
                view.grad = None
        return errors, [_summed_gradient(copies) for copies in zip(*(leaf.tensors for leaf in leaves))]

    def _same(self, shared: Shared) -> list[Shared]:
        return [shared] * len(self._fields)

    def _over_chunks(self, function: Callable[..., Tensor], patches: Patches, shared: Sequence[Shared]) -> Tensor:
        """Return the function's values of all patches; core i takes shared[i]."""

        def arguments(core: int, part: Part) -> tuple[Any, ...]:
            _, chunk = part
            return self._fields[core], shared[core].at(chunk.positions), chunk, self.inner

        return self._run(function, patches, arguments)

    def _run(
        self, function: Callable[..., Tensor], patches: Patches, arguments: Callable[[int, Part], tuple[Any, ...]]
    ) -> Tensor:
        together = 1 if self.field.config.independent else self.field.config.positions
        parts = list(patches.chunks(self.inner.chunk, self._cores.count, together))
        return self._cores.run(function, parts, arguments, parts[0][1].targets.shape)

    @cached_property
    def _cores(self) -> Cores:
        return Cores(self.compiled, self.field.modulation_weight.device)

    @cached_property
    def _fields(self) -> list[Field]:
        """The field, and for every further core a view of it: the same memory, but gradients of its own."""
        return [self.field, *(_view(self.field) for _ in range(self._cores.count - 1))]


def _view(field: Field) -> Field:
    memo = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in field.parameters()}
    return copy.deepcopy(field, memo)


def _summed_gradient(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return the sum of the tensors' gradients in order, None where none has one."""
    gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
    return sum(gradients[1:], gradients[0]) if gradients else None
