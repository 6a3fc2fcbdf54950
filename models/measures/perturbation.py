"""Effect of a latent number on the image: one position (locality), one channel everywhere (App. C.5), one entry of a
vector (App. B.3).

Over any decoder. Every call decodes the same latents in the same places of the batch, so that a pixel which does not
depend on what was perturbed comes out bit for bit the same, and "exactly 1" is meaningful.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from functa.models.field.grid import patchify

Decode = Callable[[Tensor], Tensor]

"""Latents [n, s, s, c] -> images [n, H, W, ch], unclamped."""


def squared_by_patch(change: Tensor, grid: int) -> Tensor:
    """Summed squares of changes [n, H, W, ch] in each of grid x grid patches: float64 [n, grid^2].

    Sides that the grid does not divide give patches that differ by a pixel.
    """
    rows, columns = (torch.arange(side) * grid // side for side in change.shape[1:3])
    patches = (rows[:, None] * grid + columns).flatten()  # [H W], the patch of each pixel
    squares = change.double().square().sum(-1).flatten(1)
    return squares.new_zeros(len(change), grid**2).index_add_(1, patches.to(squares.device), squares)


def reference_grid(resolution: Sequence[int], wanted: int) -> int:
    """Patches per side at which a vector's reach is measured: `wanted`, or fewer so that each has 2x2 pixels.

    1 where two do not fit: the whole image, which shows nothing about locality.
    """
    return max(1, min(wanted, *(side // 2 for side in resolution)))


def even_share(resolution: Sequence[int], grid: int) -> float:
    """Return what the largest of grid x grid patches has of an even change: its share of the pixels."""
    return math.prod(-(-side // grid) / side for side in resolution)


def locality(decode: Decode, z: Tensor, sd: Tensor, positions: Sequence[int], generator: torch.Generator) -> Tensor:
    """Share of the squared change inside its own patch when one position alone is perturbed: float64 [positions, n].

    z [n, s, s, c], sd [s, s, c]. All channels of the position move by one standard deviation, each up or down by the
    generator's choice. 1 where patches are independent (nearest interpolation, 1x1 map); NaN where nothing changed.
    """
    n, s, _, channels = z.shape
    base, shares = decode(z), []
    for position in positions:
        row, column = divmod(position, s)
        signs = torch.randint(0, 2, (n, channels), generator=generator) * 2 - 1
        moved = z.clone()
        moved[:, row, column] += signs * sd[row, column]
        squares = squared_by_patch(decode(moved) - base, s)  # [n, s s]
        shares.append(squares[:, position] / squares.sum(1))
    return torch.stack(shares)


@dataclass(frozen=True, eq=False)
class EntryEffects:
    """Measure single entries of a vector, [entries, n]: mean absolute error, largest share of the squared change in one
    patch (NaN where nothing changed)."""

    mae: Tensor
    largest_share: Tensor


def entry_effects(decode: Decode, z: Tensor, sd: Tensor, entries: Sequence[int], grid: int) -> EntryEffects:
    """Each entry of vectors z [n, 1, 1, c] raised by its own standard deviation, sd [1, 1, c] (Fig. 4).

    A vector has no patches of its own: the image is cut into grid x grid, and the largest share that falls into any
    one of them measures locality. An even change gives even_share, 1 / grid^2 where the grid divides the image.
    """
    base, errors, shares = decode(z), [], []
    for entry in entries:
        moved = z.clone()
        moved[..., entry] += sd[..., entry]
        change = decode(moved) - base
        squares = squared_by_patch(change, grid)
        errors.append(change.double().abs().mean((1, 2, 3)))
        shares.append(squares.amax(1) / squares.sum(1))
    return EntryEffects(torch.stack(errors), torch.stack(shares))


@dataclass(frozen=True, eq=False)
class ChannelEffects:
    """Measure single channels, moved by the same amount at every position.

    rmse [channels, strengths]: root of the mean squared change of a patch, averaged over patches and images.
    between_patches, between_images [channels]: mean cosine of the change patterns of an image's patches, and of the
    images' mean patterns, at the largest strength; NaN where fewer than two changed.
    """

    rmse: Tensor
    between_patches: Tensor
    between_images: Tensor


def channel_effects(
    decode: Decode, z: Tensor, channels: Sequence[int], strengths: Sequence[float], grid: int
) -> ChannelEffects:
    """Each channel of z [n, s, s, c] moved everywhere by each strength (Figs. 12, 13); grid = s for its own patches."""
    base, strongest = decode(z), max(range(len(strengths)), key=lambda i: strengths[i])
    rmse, patches, images = [], [], []
    for channel in channels:
        curve = []
        for position, strength in enumerate(strengths):
            moved = z.clone()
            moved[..., channel] += strength
            pattern = patchify((decode(moved) - base).double(), grid).flatten(1)  # [n grid^2, P ch]
            curve.append(pattern.square().mean(1).sqrt().mean())
            if position == strongest:
                pattern = pattern.reshape(len(z), -1, pattern.shape[1])  # [n, grid^2, P ch]
                patches.append(agreement(pattern).nanmean())
                images.append(agreement(pattern.mean(1)))
        rmse.append(torch.stack(curve))
    return ChannelEffects(torch.stack(rmse), torch.stack(patches), torch.stack(images))


def agreement(patterns: Tensor) -> Tensor:
    """Mean cosine over the pairs of patterns [..., N, D] -> [...]; patterns of zeros have no direction and are left
    out, and fewer than two others give NaN."""
    lengths = patterns.norm(dim=-1, keepdim=True)
    directions = torch.where(lengths > 0, patterns / lengths, 0)  # [..., N, D]
    count = (lengths > 0).sum((-1, -2)).to(patterns.dtype)
    pairs = directions.sum(-2).square().sum(-1) - count  # sum over ordered pairs of different patterns
    return torch.where(count > 1, pairs / (count * (count - 1)), torch.nan)


def linear_fit(strengths: Tensor, rmse: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares line through the origin of rmse [c, m] over |strengths| [m]: slope [c], R^2 [c].

    No perturbation is no change, so the origin is a point of every curve and counts. NaN R^2 where nothing changed.
    """
    x = torch.cat([strengths.double().abs(), strengths.new_zeros(1, dtype=torch.float64)])  # [m + 1]
    y = torch.cat([rmse.double(), rmse.new_zeros(len(rmse), 1, dtype=torch.float64)], 1)  # [c, m + 1]
    slope = (y @ x) / x.square().sum()
    residual = (y - slope[:, None] * x).square().sum(1)
    spread = (y - y.mean(1, keepdim=True)).square().sum(1)
    return slope, torch.where(spread > 0, 1 - residual / spread, torch.nan)
