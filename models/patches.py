"""Images cut into the patches of their latent positions, with all that a pass over them needs to know."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.config import FieldConfig
from models.grid import interpolation_weights, patchify, pixel_coordinates


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

    def chunks(self, pixels: int, parts: int = 1) -> Iterator[tuple[slice, "Patches"]]:
        """Equal chunks of at most so many pixels, at least `parts` if there are so many patches.

        Equal, so that one compiled graph serves all.
        """
        size = chunk_patches(len(self), pixels, self.targets.shape[1], parts)
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
            f"a {config.kernel}x{config.kernel} map and {config.interpolation} interpolation tie patches together: "
            f"leave out meta_train.patches_per_image, or set field.interpolation=nearest and field.kernel=1"
        )
    return Patches(targets, chosen, x if len(x) == 1 else x[chosen], interpolation_weights(config, resolution, images))


def at(shared: Tensor, positions: Tensor) -> Tensor:
    """Rates (), [c] or [s s, c] at patches of these positions: broadcastable to [N, c]."""
    return shared[positions] if shared.dim() == 2 else shared
