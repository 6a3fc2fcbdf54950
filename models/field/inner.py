"""The inner loop: gradient steps on every latent from zero (meta-SGD), and the outer loss through them.

Exact savings over the plain loop:

- The first step starts from zero for every image, so f(0) and its Jacobian are computed once (passes.first_step); what
  remains of that step is a matmul per patch. With K = 3 steps 4 of 6 passes remain, of the outer step's 21 remain 15.
- Patches are taken in chunks whose activations stay in cache. Where a patch depends on its own latent alone (nearest
  interpolation, 1x1 map) a chunk runs the whole loop as one graph; elsewhere, and with inner.checkpoint, the steps go
  over all chunks one by one (sweep.Sweep; 19 passes). Either way nothing but pixels and latents grows with the batch,
  nor with the image where s > 1: a chunk is one patch at least, and of s = 1 that is the image.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from functa.models.compute.compilation import compiled
from functa.models.compute.parallel import keep_memory, side_by_side
from functa.models.config import InnerConfig
from functa.models.field.field import Field
from functa.models.field.grid import Patches, at, cut, patch_shape, pixel_coordinates
from functa.models.field.passes import FirstStep, first_gradient, first_step, inner_gradient, patch_errors, tensor_cores
from functa.models.field.stepwise import Sweep

Hot = Callable[..., Tensor]  # (field, first step, patches, rates, inner, scale) -> one value per patch

Arguments = Callable[[slice, Patches], tuple[Any, ...]]  # (rows, their chunk) -> what a function takes of it


def encode_patches(
    field: Field, first: FirstStep, patches: Patches, rates: Tensor, inner: InnerConfig, scale: float
) -> Tensor:
    """The whole loop over independent patches: rates broadcastable to [N, c] -> latents [N, c]."""
    z = _zeros(field, patches)
    if first.shared:
        z = -rates * _kept(first_gradient(field, first, patches.targets, None, scale)[:, 0], inner)
    for _ in range(inner.steps - int(first.shared)):
        z = _stepped(field, z, patches, rates, inner, scale)
    return z


def patches_by_step(
    field: Field, first: FirstStep, patches: Patches, rates: Tensor, inner: InnerConfig, scale: float
) -> Tensor:
    """The latents of encode_patches before the first inner step and after each, [N, steps + 1, c]."""
    z = [_zeros(field, patches)]
    if first.shared:
        z.append(encode_patches(field, first, patches, rates, inner.model_copy(update={"steps": 1}), scale))
    while len(z) <= inner.steps:
        z.append(_stepped(field, z[-1], patches, rates, inner, scale))
    return torch.stack(z, 1)


def _zeros(field: Field, patches: Patches) -> Tensor:
    return torch.zeros_like(patches.targets[:, 0, :1]).expand(-1, field.config.channels)


def _stepped(field: Field, z: Tensor, patches: Patches, rates: Tensor, inner: InnerConfig, scale: float) -> Tensor:
    """Latents [N, c] after an inner step more."""
    gradient = inner_gradient(field, z[:, None], patches.targets, patches.x, None, scale, inner.precision)
    return z - rates * _kept(gradient[:, 0], inner)


def _kept(gradient: Tensor, inner: InnerConfig) -> Tensor:
    return gradient.detach() if inner.first_order else gradient


def encoded_errors(
    field: Field, first: FirstStep, patches: Patches, rates: Tensor, inner: InnerConfig, scale: float
) -> Tensor:
    """Mean squared error [N] of independent patches after encode_patches."""
    z = encode_patches(field, first, patches, rates, inner, scale)
    return patch_errors(field, z[:, None], patches.targets, patches.x, None, inner.precision)


@dataclass(frozen=True, eq=False)
class Worker:
    """What one core works with: a view of the field, and leaves for what its chunks share."""

    field: Field
    first: FirstStep
    rates: Tensor


def _view(field: Field) -> Field:
    """A field on the same memory, with gradients of its own."""
    memo = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in field.parameters()}
    return copy.deepcopy(field, memo)


def _added_up(tensors: Sequence[Tensor]) -> Tensor | None:
    """The sum of their gradients in order, None where none has one."""
    gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
    return sum(gradients[1:], gradients[0]) if gradients else None


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

    def prepared(self, images: int) -> "InnerLoop":
        """The same loop with its first step computed once, for encoding about so many images."""
        with torch.no_grad(), tensor_cores(self.inner.precision):
            return replace(self, first=self._first(images, self.field.modulation_weight))

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, H, W, ch] in [0, 1] -> latents [B, s, s, c] (paper section 4).

        Raises ValueError for images of another shape or type than the loop's, and for pixels that are no numbers:
        their latents would look like any others.
        """
        self._check(images)
        if not bool(torch.isfinite(images).all()):
            bad = (~torch.isfinite(images)).flatten(1).any(1).nonzero().flatten().tolist()
            raise ValueError(f"images {bad[:8]} of the batch have NaN or infinite pixels: mend or drop them")
        with torch.no_grad(), tensor_cores(self.inner.precision):
            first, rates = self._first(len(images), images), self._rates()
            patches = cut(self.field.config, images)
            if self._whole:
                z = self._over_chunks(encode_patches, patches, first, rates)
            else:
                z = self._sweep(patches).latents(first, rates)
        return z.reshape(len(images), *self.field.config.latent_shape)

    def by_step(self, images: Tensor) -> Tensor:
        """Images [B, H, W, ch] -> latents before the first inner step and after each, [steps + 1, B, s, s, c].

        One pass; the last are those of encode. Raises ValueError for images of another shape or type.
        """
        self._check(images)
        with torch.no_grad(), tensor_cores(self.inner.precision):
            first, rates = self._first(len(images), images), self._rates()
            patches = cut(self.field.config, images)
            if self._whole:
                z = self._over_chunks(patches_by_step, patches, first, rates).transpose(0, 1)
            else:
                steps: list[tuple[Tensor, Tensor]] = []
                last = self._sweep(patches).latents(first, rates, steps)
                z = torch.stack([*(before for before, _ in steps), last])
        return z.reshape(-1, len(images), *self.field.config.latent_shape)

    def errors(self, images: Tensor) -> Tensor:
        """Squared error of each image after the inner loop, [B], without gradients. Raises ValueError as encode."""
        self._check(images)
        with torch.no_grad(), tensor_cores(self.inner.precision):
            first, rates = self._first(len(images), images), self._rates()
            patches = cut(self.field.config, images)
            if self._whole:
                errors = self._over_chunks(encoded_errors, patches, first, rates)
            else:
                sweep = self._sweep(patches)
                errors = sweep.errors(sweep.latents(first, rates))
        return errors.reshape(len(images), -1).mean(1)

    def errors_at(self, images: Tensor, z: Tensor) -> Tensor:
        """Squared error of each image decoded from latents z [B, s, s, c], [B]: of float32 passes at any precision.

        What decoding the batch would give, but in chunks that stay in cache and compiled where the loop is. Raises
        ValueError as encode.
        """
        self._check(images)
        with torch.no_grad(), tensor_cores("float32"):
            patches, latents = cut(self.field.config, images), z.flatten(0, -2)
            if self._whole:
                fields = self._copies

                def of(field: Field) -> Arguments:
                    return lambda rows, chunk: (field, latents[rows, None], chunk.targets, chunk.x, None, "float32")

                errors = self._spread(patch_errors, patches, [of(field) for field in fields])
            else:
                errors = self._sweep(patches).errors(latents, "float32")
        return errors.reshape(len(images), -1).mean(1)

    def outer_backward(self, images: Tensor, positions: Tensor | None = None, share: float = 1.0) -> Tensor:
        """Adds the gradient of share times the outer loss to every shared parameter; returns each image's error [B].

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
            errors = self._backward(patches, self._first(len(images), images), self._rates())
        # Differentiated as a sum over patches, a mean only now: half precision has no room for 1 / (B s^2).
        for parameter, kept in zip(parameters, before):
            if parameter.grad is not None:
                parameter.grad.mul_(share / len(patches))
            if kept is not None:
                parameter.grad = kept if parameter.grad is None else parameter.grad.add_(kept)
        return errors.reshape(len(images), -1).mean(1)

    def __post_init__(self) -> None:
        self.field.check_resolution(self.resolution)
        patch_shape(self.resolution, self.field.config.spatial)

    def _check(self, images: Tensor) -> None:
        expected = (*self.resolution, self.field.image_channels)
        if tuple(images.shape[1:]) != expected or not images.is_floating_point() or len(images) == 0:
            raise ValueError(
                f"images {tuple(images.shape)} of {images.dtype} are not floats [B, {', '.join(map(str, expected))}] "
                f"in [0, 1]: resize or convert them, or build the loop for their shape"
            )

    @property
    def _whole(self) -> bool:
        """Whether a chunk runs the whole loop as one graph."""
        return self.field.config.independent and not self.inner.checkpoint

    def _sweep(self, patches: Patches) -> Sweep:
        return Sweep(self.field, self.inner, patches, self._scale(patches), self._run)

    def _backward(self, patches: Patches, first: FirstStep, rates: Tensor) -> Tensor:
        """Adds the gradients of the sum of all patches' errors to the field's parameters; returns the errors [N]."""
        shared = (first.output, first.jacobian, rates)
        workers = [
            Worker(field, replace(first, output=output, jacobian=jacobian), leaf)
            for field in (self._copies if self._whole else [self.field])
            for output, jacobian, leaf in [[t.detach().requires_grad_() for t in shared]]
        ]
        if self._whole:
            errors = self._spread(encoded_errors, patches, [self._of_loop(worker, patches) for worker in workers])
        else:
            errors = self._sweep(patches).backward(workers[0].first, workers[0].rates)
        # What the chunks share is differentiated once, from the sum of the chunks' cotangents.
        leaves = [[w.first.output, w.first.jacobian, w.rates] for w in workers]
        cotangents = [_added_up(copies) for copies in zip(*leaves)]
        reached = [(t, g) for t, g in zip(shared, cotangents) if g is not None and t.requires_grad]
        for own, *views in zip(*(w.field.parameters() for w in workers)):
            own.grad = _added_up([own, *views])
            for view in views:
                view.grad = None
        torch.autograd.backward([t for t, _ in reached], [g for _, g in reached])
        return errors

    def _over_chunks(self, function: Hot, patches: Patches, first: FirstStep, rates: Tensor) -> Tensor:
        """The function's values for all patches, without a graph."""
        workers = [Worker(field, first, rates) for field in self._copies]
        return self._spread(function, patches, [self._of_loop(worker, patches) for worker in workers])

    def _of_loop(self, worker: Worker, patches: Patches) -> Arguments:
        """What a Hot function takes of a chunk."""
        scale = self._scale(patches)

        def arguments(_: slice, chunk: Patches) -> tuple[Any, ...]:
            first, rates = worker.first.at(chunk.positions), at(worker.rates, chunk.positions)
            return worker.field, first, chunk, rates, self.inner, scale

        return arguments

    def _spread(self, function: Callable[..., Tensor], patches: Patches, workers: Sequence[Arguments]) -> Tensor:
        """The function over all chunks, worker i taking chunks i, i + n, ...; differentiated where gradients are on.

        Which chunks a worker takes, and in which order it adds their gradients up, is fixed: so are all results.
        """
        chunks = list(patches.chunks(self.inner.chunk, len(workers)))
        values: list[Tensor] = [patches.targets] * len(chunks)

        def work(number: int) -> None:
            worker = workers[number]
            for place in range(number, len(chunks), len(workers)):
                value = run(*worker(*chunks[place]))
                if torch.is_grad_enabled():
                    value.sum().backward()
                # A CUDA graph's next run writes where its last one's output lies.
                values[place] = value.detach().clone() if value.is_cuda else value.detach()

        parts = [partial(work, number) for number in range(min(len(workers), len(chunks)))]
        run = self._run(function, one_core=len(parts) > 1)
        signature = (function, torch.is_grad_enabled(), chunks[0][1].targets.shape)
        if len(parts) == 1:
            keep_memory()
            work(0)
        elif signature in self._built:
            side_by_side(parts)
        else:  # two threads would compile the same graph twice
            for part in parts:
                side_by_side([part], len(parts))
            self._built.add(signature)
        return torch.cat(values)

    @cached_property
    def _built(self) -> set[tuple[Any, ...]]:
        return set()

    @cached_property
    def _copies(self) -> list[Field]:
        """The field, and for every further core a view of it: the same memory, but gradients of its own.

        Only what is compiled is worth a core of its own: eager operations hold the interpreter between them.
        """
        cores = torch.get_num_threads() if self.compiled and self._device.type == "cpu" else 1
        return [self.field, *(_view(self.field) for _ in range(cores - 1))]

    @property
    def _device(self) -> torch.device:
        return self.field.modulation_weight.device

    def _run(self, function: Hot, one_core: bool = False) -> Hot:
        return compiled(function, self._device.type, one_core) if self.compiled else function

    def _scale(self, patches: Patches) -> float:
        """Factor before the sum of squared errors: the mean over the image, or over one patch (s^2 times that)."""
        per_patch = 1 / patches.targets[0].numel()
        return per_patch if self.inner.loss == "patch" else per_patch / self.field.config.positions

    def _first(self, images: int, like: Tensor) -> FirstStep:
        if self.first is not None:
            return self.first
        x = pixel_coordinates(self.field.config, self.resolution, like)
        return first_step(self.field, x, self.inner.precision, images * self.field.config.positions)

    def _rates(self) -> Tensor:
        """(), [c] or [s s, c]; clipped if so configured."""
        rates: Tensor = self.field.rates
        if self.inner.rates_clip is not None:
            rates = rates.clamp(*self.inner.rates_clip)
        return rates.flatten(0, -2) if rates.dim() > 1 else rates


def decode(field: Field, z: Tensor, resolution: tuple[int, ...]) -> Tensor:
    """Latents [B, s, s, c] -> images [B, H, W, ch] clamped to [0, 1], for eyes and downstream measures, not PSNR."""
    with torch.no_grad():
        return field(z, resolution).clamp(0, 1)
