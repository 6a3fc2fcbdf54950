"""The latent grid and the pixels: which pixel belongs to which latent position, and where in it."""

import torch
from torch import Tensor


def patch_shape(resolution: tuple[int, int], spatial: int) -> tuple[int, int]:
    """Height and width in pixels of one latent position's patch. Raises ValueError if s does not divide the image."""
    height, width = resolution
    if height % spatial or width % spatial:
        raise ValueError(
            f"a {height}x{width} image is not divisible into {spatial}x{spatial} latent positions: "
            f"choose field.spatial among the common divisors, or another images.resolution"
        )
    return height // spatial, width // spatial


def patchify(images: Tensor, spatial: int) -> Tensor:
    """Images [B, H, W, ch] -> patches [B s s, P, ch], P pixels row by row; positions row by row too."""
    batch, height, width, channels = images.shape
    rows, columns = patch_shape((height, width), spatial)
    patches = images.reshape(batch, spatial, rows, spatial, columns, channels)
    patches = patches.permute(0, 1, 3, 2, 4, 5)  # [B, s, s, rows, columns, ch]
    return patches.reshape(batch * spatial * spatial, rows * columns, channels)


def unpatchify(patches: Tensor, spatial: int, resolution: tuple[int, int]) -> Tensor:
    """The inverse of patchify: [B s s, P, ch] -> [B, H, W, ch]."""
    rows, columns = patch_shape(resolution, spatial)
    channels = patches.shape[-1]
    images = patches.reshape(-1, spatial, spatial, rows, columns, channels)
    return images.permute(0, 1, 3, 2, 4, 5).reshape(-1, *resolution, channels)


def patch_coordinates(shape: tuple[int, int], like: Tensor) -> Tensor:
    """Pixel centres of one patch in [0, 1]^2, row first (App. C): [P, 2], of `like`'s type and device."""
    axes = [(torch.arange(n, dtype=like.dtype, device=like.device) + 0.5) / n for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
