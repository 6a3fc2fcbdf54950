"""The latent grid and the pixels: which pixel belongs to which latent position, and what it sees of its neighbours.

Everything holds for signals on 1, 2 or 3 axes (audio, images, volumes or video); shapes are written for images. A
position's *patch* is the block of pixels around it. Bilinear interpolation between pixel centres reaches one position
further on each side, so a pixel is a weighted mean over the 3^2 positions about its patch, with weights that are the
same in every patch; nearest interpolation is the case of one position with weight 1. A 3x3 map widens that in the same
manner, and both together are one table of indices: `neighbours`.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from functa.models.config import FieldConfig
from functa.models.field.cost import coordinate_bits


def patch_shape(resolution: Sequence[int], spatial: int) -> tuple[int, ...]:
    """Sides in pixels of one latent position's patch. Raises ValueError if s does not divide the image."""
    if any(side % spatial for side in resolution):
        raise ValueError(
            f"a {'x'.join(map(str, resolution))} image is not divisible into "
            f"{'x'.join([str(spatial)] * len(resolution))} latent positions: "
            f"choose field.spatial among the common divisors, or another images.resolution"
        )
    return tuple(side // spatial for side in resolution)


def patchify(images: Tensor, spatial: int) -> Tensor:
    """Images [B, H, W, ch] -> patches [B s s, P, ch], P pixels row by row; positions row by row too."""
    batch, *resolution, channels = images.shape
    patch = patch_shape(resolution, spatial)
    axes = len(patch)
    split = images.reshape(batch, *itertools.chain(*((spatial, side) for side in patch)), channels)
    order = [0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1]
    return split.permute(order).reshape(batch * spatial**axes, math.prod(patch), channels)


def unpatchify(patches: Tensor, spatial: int, resolution: Sequence[int]) -> Tensor:
    """The inverse of patchify: [B s s, P, ch] -> [B, H, W, ch]."""
    patch = patch_shape(resolution, spatial)
    axes, channels = len(patch), patches.shape[-1]
    split = patches.reshape(-1, *[spatial] * axes, *patch, channels)
    order = [0, *itertools.chain(*((1 + axis, 1 + axes + axis) for axis in range(axes))), 2 * axes + 1]
    return split.permute(order).reshape(-1, *resolution, channels)


def pixel_coordinates(config: FieldConfig, resolution: Sequence[int], like: Tensor) -> Tensor:
    """Coordinates of every patch's pixels: [1, P, 2] if all patches share them, else [s s, P, width].

    patch: pixel centres in [0, 1]^2 of each patch; global: in [0, 1]^2 of the image; binary: the bits of the pixel's
    index, highest first, rows before columns (App. C: (3/32, 5/32) is 0001100101). Type and device are `like`'s.
    """
    patch = patch_shape(resolution, config.spatial)
    if config.coordinates == "patch":
        return _mesh([_centres(side, like) for side in patch]).reshape(1, -1, config.axes)
    if config.coordinates == "global":
        features = _mesh([_centres(side, like) for side in resolution])
    else:
        features = _mesh([_bits_of(side, like) for side in resolution])
    return patchify(features[None], config.spatial)  # [s s, P, width]


def _centres(side: int, like: Tensor) -> Tensor:
    return ((torch.arange(side, dtype=like.dtype, device=like.device) + 0.5) / side)[:, None]


def _bits_of(side: int, like: Tensor) -> Tensor:
    places = torch.arange(coordinate_bits(side) - 1, -1, -1, device=like.device)
    return ((torch.arange(side, device=like.device)[:, None] >> places) & 1).to(like.dtype)


def _mesh(features: list[Tensor]) -> Tensor:
    """Features [n_i, k_i] of every axis -> [n_1, n_2, k_1 + k_2], rows first."""
    sides = [len(feature) for feature in features]
    spread = [
        feature.reshape(*[1] * i, len(feature), *[1] * (len(sides) - i - 1), -1).expand(*sides, -1)
        for i, feature in enumerate(features)
    ]
    return torch.cat(spread, dim=-1)


def interpolation_weights(config: FieldConfig, resolution: Sequence[int], like: Tensor) -> Tensor | None:
    """Weight of every neighbour's modulations at every pixel of a patch, [P, 3^2]; None for nearest interpolation."""
    if config.interpolation == "nearest":
        return None
    weights = like.new_ones(1, 1)
    for side in patch_shape(resolution, config.spatial):
        inside = (torch.arange(side, dtype=like.dtype, device=like.device) + 0.5) / side - 0.5  # from the own centre
        before, after = (-inside).clamp(min=0), inside.clamp(min=0)
        axis = torch.stack([before, 1 - before - after, after], -1)  # [side, 3]
        weights = torch.einsum("pk,ql->pqkl", weights, axis).reshape(len(weights) * side, -1)
    return weights


def neighbours(config: FieldConfig) -> Tensor | None:
    """Latent positions that a patch's modulations are made of: int64 [s s, K T]; None if only its own.

    K = 3^2 for bilinear interpolation, whose neighbours beyond the border are the border's ("clamped"), each of which
    has T = k^2 taps of the map, for which beyond the border lies zero ("same" padding), written as position s s.
    """
    if not config.gathers:
        return None
    grid = torch.cartesian_prod(*[torch.arange(config.spatial)] * config.axes).reshape(-1, config.axes)  # [s s, 2]
    reach = 1 if config.interpolation == "bilinear" else 0
    around = (grid[:, None] + _offsets(reach, config.axes)).clamp(0, config.spatial - 1)  # [s s, K, 2]
    taps = around[:, :, None] + _offsets(config.kernel // 2, config.axes)  # [s s, K, T, 2]
    inside = ((taps >= 0) & (taps < config.spatial)).all(-1)
    strides = torch.tensor([config.spatial**i for i in reversed(range(config.axes))])
    return torch.where(inside, (taps * strides).sum(-1), config.positions).flatten(1)  # [s s, K T]


def _offsets(reach: int, axes: int) -> Tensor:
    """All offsets of at most `reach` along every axis, row by row: [(2 reach + 1)^2, 2]."""
    return torch.cartesian_prod(*[torch.arange(-reach, reach + 1)] * axes).reshape(-1, axes)


def gather(z: Tensor, index: Tensor, config: FieldConfig) -> Tensor:
    """Latents [B, s s, c] -> what every patch's modulations are made of, [B s s, K, T c] (grid.neighbours)."""
    batch, positions, channels = z.shape
    padded = torch.cat([z, z.new_zeros(batch, 1, channels)], dim=1)  # position s s is the zero beyond the border
    taps = config.kernel**config.axes
    return padded[:, index].reshape(batch * positions, -1, taps * channels)


def scatter(gathered: Tensor, index: Tensor, batch: int, channels: int) -> Tensor:
    """The adjoint of gather: [B s s, K, T c] -> [B, s s, c], what was gathered from one position added up."""
    summed = gathered.new_zeros(batch, len(index) + 1, channels)
    return summed.index_add_(1, index.flatten(), gathered.reshape(batch, -1, channels))[:, :-1]


@dataclass(frozen=True, eq=False)
class Patches:
    """N patches of P pixels: targets [N, P, ch], their latent positions int64 [N], coordinates x [1 or N, P, in],
    interpolation weights [P, K] (None: nearest)."""

    targets: Tensor
    positions: Tensor
    x: Tensor
    weights: Tensor | None

    def __len__(self) -> int:
        return len(self.targets)

    def chunks(self, pixels: int, parts: int = 1, together: int = 1) -> Iterator[tuple[slice, "Patches"]]:
        """Equal chunks of at most so many pixels, at least `parts` if there are so many patches.

        Equal, so that one compiled graph serves all. So many patches in a row stay `together`.
        """
        size = together * chunk_patches(len(self) // together, pixels, together * self.targets.shape[1], parts)
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            x = self.x if len(self.x) == 1 else self.x[rows]
            yield rows, replace(self, targets=self.targets[rows], positions=self.positions[rows], x=x)


def chunk_patches(patches: int, pixels: int, patch_pixels: int, parts: int = 1) -> int:
    """Patches per chunk: the largest divisor of `patches` whose pixels number at most `pixels` (at least 1).

    No more than leaves a chunk for each of so many parts.
    """
    limit = max(1, min(pixels // patch_pixels, patches // parts))
    return next(n for n in range(min(limit, patches), 0, -1) if patches % n == 0)


def cut(config: FieldConfig, images: Tensor, positions: Tensor | None = None) -> Patches:
    """Images [B, H, W, ch] -> their B s s patches, image by image; with positions int64 [B, n] only those of each.

    Raises ValueError if s does not divide the image, or for a choice of patches that are not independent.
    """
    resolution = images.shape[1:-1]
    targets = patchify(images, config.spatial)  # [B s s, P, ch]
    x = pixel_coordinates(config, resolution, images)
    every = torch.arange(config.positions, device=images.device)
    if positions is None:
        chosen = every.repeat(len(images))
    elif config.independent:
        chosen = positions.flatten()
        rows = config.positions * torch.arange(len(images), device=images.device)[:, None] + positions
        targets = targets[rows.flatten()]
    else:
        raise ValueError(
            f"a {config.kernel}x{config.kernel} map, {config.interpolation} interpolation and a mixer of "
            f"{config.mixer} blocks tie patches together: leave out meta_train.patches_per_image, or set "
            f"field.interpolation=nearest, field.kernel=1 and field.mixer=0"
        )
    return Patches(targets, chosen, x if len(x) == 1 else x[chosen], interpolation_weights(config, resolution, images))
