"""The inner loop: gradient steps on every latent from zero (meta-SGD), and the outer loss through them.

Exact savings over the plain loop:

- The first step starts from zero for every image, so f(0) and its Jacobian are computed once (passes.first_step); what
  remains of that step is a matmul per patch. With K = 3 steps 4 of 6 passes remain, of the outer step's 21 remain 15.
- Patches are taken in chunks whose activations stay in cache. Where a patch depends on its own latent alone (nearest
  interpolation, 1x1 map), or a chunk holds whole images, it runs the whole loop as one graph (chunkwise); elsewhere,
  and with inner.checkpoint, the steps go over all chunks one by one (stepwise). Either way nothing but pixels and
  latents grows with the batch, nor with the image where s > 1: a chunk is one patch at least, and of s = 1 that is the
  image.

The steps themselves are in inner_step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from functa.models.config import InnerConfig
from functa.models.field.chunkwise import Chunkwise
from functa.models.field.cost import checkpoints
from functa.models.field.field import Field
from functa.models.field.grid import Patches, cut, patch_shape, pixel_coordinates
from functa.models.field.inner_step import Shared
from functa.models.field.passes import FirstStep, first_step, tensor_cores
from functa.models.field.stepwise import Stepwise


class Engine(Protocol):
    """A way to take the steps over a batch's patches. Latents are [N, c], errors are squared errors [N] of patches."""

    def latents(self, patches: Patches, shared: Shared) -> Tensor:
        """Return the latents after the last inner step, without a graph, as all of these but backward."""

    def by_step(self, patches: Patches, shared: Shared) -> Tensor:
        """Return the latents before the first inner step and after each, [steps + 1, N, c]."""

    def errors(self, patches: Patches, shared: Shared) -> Tensor:
        """Return the errors after the last inner step."""

    def errors_at(self, patches: Patches, z: Tensor) -> Tensor:
        """Return the errors at latents z, of float32 passes at any precision."""

    def backward(self, patches: Patches, shared: Shared) -> tuple[Tensor, list[Tensor | None]]:
        """Add the gradients of the errors' sum to the field's parameters; return the errors and what is shared.

        Of `shared.tensors` the gradients are returned, None for one that was not reached.
        """


@dataclass(frozen=True, eq=False)
class InnerLoop:
    """The inner loop of one field at one resolution; `compiled` wraps its hot functions in torch.compile.

    `first` is the first step of a field that no longer changes (prepared); None: computed at every call.
    """

    field: Field
    inner: InnerConfig
    resolution: tuple[int, ...]
    compiled: bool = False
    first: FirstStep | None = None

    def __post_init__(self) -> None:
        self.field.check_resolution(self.resolution)
        patch_shape(self.resolution, self.field.config.spatial)

    def prepared(self, images: int) -> "InnerLoop":
        """Return the same loop with its first step computed once, for encoding about so many images."""
        with torch.no_grad(), tensor_cores(self.inner.precision):
            return replace(self, first=self._first(images, self.field.modulation_weight))

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, H, W, ch] in [0, 1] -> latents [B, s, s, c] (paper section 4).

        Raises ValueError for images of another shape or type than the loop's, and for pixels that are NaN or
        infinite: their latents would look like any others.
        """
        self._check(images)
        if not bool(torch.isfinite(images).all()):
            bad = (~torch.isfinite(images)).flatten(1).any(1).nonzero().flatten().tolist()
            raise ValueError(f"images {bad[:8]} of the batch have NaN or infinite pixels: repair or remove them")
        return self._of_batch(self._engine.latents, images).reshape(len(images), *self.field.config.latent_shape)

    def by_step(self, images: Tensor) -> Tensor:
        """Images [B, H, W, ch] -> latents before the first inner step and after each, [steps + 1, B, s, s, c].

        One pass; the last are those of encode. Raises ValueError for images of another shape or type.
        """
        self._check(images)
        return self._of_batch(self._engine.by_step, images).reshape(-1, len(images), *self.field.config.latent_shape)

    def errors(self, images: Tensor) -> Tensor:
        """Return each image's squared error after the inner loop, [B]. Raises ValueError as encode."""
        self._check(images)
        return self._of_batch(self._engine.errors, images).reshape(len(images), -1).mean(1)

    def errors_at(self, images: Tensor, z: Tensor) -> Tensor:
        """Return the squared error of each image decoded from latents z [B, s, s, c], [B], at float32.

        Equals decoding the batch, but in chunks that stay in cache, and compiled where the loop is. Raises ValueError
        as encode.
        """
        self._check(images)
        with torch.no_grad(), tensor_cores("float32"):
            errors = self._engine.errors_at(cut(self.field.config, images), z.flatten(0, -2))
        return errors.reshape(len(images), -1).mean(1)

    def outer_backward(self, images: Tensor, positions: Tensor | None = None, share: float = 1.0) -> Tensor:
        """Add the gradient of share times the outer loss to every shared parameter; return each image's error [B].

        The loss is the mean squared error after the last inner step, differentiated through all of them (second
        order, unless inner.first_order). `positions` int64 [B, n] picks patches of every image, an unbiased estimate
        where patches are independent (ValueError elsewhere); `share` is the images' share of the step's batch.
        Raises ValueError for images of another shape or type, and in a loop that is prepared for encoding.
        """
        self._check(images)
        if self.first is not None:
            raise ValueError("a loop prepared for encoding has no gradient of its first step: train another")
        patches = cut(self.field.config, images, positions)
        parameters = list(self.field.parameters())
        before = [parameter.grad for parameter in parameters]
        self.field.zero_grad(set_to_none=True)
        with tensor_cores(self.inner.precision):
            shared = self._shared(images)
            errors, gradients = self._engine.backward(patches, shared)
            # What the chunks share is differentiated once, from the sum of the chunks' gradients.
            reached = [(t, g) for t, g in zip(shared.tensors, gradients) if g is not None and t.requires_grad]
            torch.autograd.backward([t for t, _ in reached], [g for _, g in reached])
        # Differentiated as a sum over patches, a mean only now: half precision cannot hold 1 / (B s^2).
        for parameter, kept in zip(parameters, before):
            if parameter.grad is not None:
                parameter.grad.mul_(share / len(patches))
            if kept is not None:
                parameter.grad = kept if parameter.grad is None else parameter.grad.add_(kept)
        return errors.reshape(len(images), -1).mean(1)

    def _of_batch(self, function: Callable[[Patches, Shared], Tensor], images: Tensor) -> Tensor:
        with torch.no_grad(), tensor_cores(self.inner.precision):
            shared = self._shared(images)
            return function(cut(self.field.config, images), shared)

    def _check(self, images: Tensor) -> None:
        expected = (*self.resolution, self.field.image_channels)
        if tuple(images.shape[1:]) != expected or not images.is_floating_point() or len(images) == 0:
            raise ValueError(
                f"images {tuple(images.shape)} of {images.dtype} are not floats [B, {', '.join(map(str, expected))}] "
                f"in [0, 1]: resize or convert them, or build the loop for their shape"
            )

    @cached_property
    def _engine(self) -> Engine:
        recomputed = checkpoints(self.field.config, self.inner, math.prod(self.resolution))
        return (Stepwise if recomputed else Chunkwise)(self.field, self.inner, self.compiled)

    def _shared(self, images: Tensor) -> Shared:
        rates: Tensor = self.field.rates
        if self.inner.rates_clip is not None:
            rates = rates.clamp(*self.inner.rates_clip)
        steps = len(rates) if self.inner.rates_per_step else 1
        shape = (steps, 1, -1) if self.inner.rates != "element" else (steps, self.field.config.positions, -1)
        return Shared(self._first(len(images), images), rates.reshape(shape))

    def _first(self, images: int, like: Tensor) -> FirstStep:
        if self.first is not None:
            return self.first
        x = pixel_coordinates(self.field.config, self.resolution, like)
        return first_step(self.field, x, self.inner.precision, images * self.field.config.positions)


def decode(field: Field, z: Tensor, resolution: tuple[int, ...]) -> Tensor:
    """Latents [B, s, s, c] -> images [B, H, W, ch] clamped to [0, 1], for eyes and downstream measures, not PSNR."""
    with torch.no_grad():
        return field(z, resolution).clamp(0, 1)
