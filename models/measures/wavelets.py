"""Wavelet packets of images, whose Frechet distances are averaged: the Frechet Wavelet Distance.

Veeramacheneni et al., ICLR 2025 (package pytorchfwd): the Haar wavelet, 16x16 coefficients a packet.
"""

import torch
from torch import Tensor

PACKET_SIDE = 16  # coefficients; the authors take level 4 of 256 pixels, 3 of 128, and so on


def packet_level(side: int) -> int:
    """Return how often images of `side` pixels are halved: down to packets of 16x16, at least once; 0 of odd ones."""
    level = max(1, (side // PACKET_SIDE).bit_length() - 1)
    while side % 2**level:
        level -= 1
    return level


def packet_numbers(side: int, channels: int) -> int:
    """Return how many coefficients a packet of square images has."""
    return (side >> packet_level(side)) ** 2 * channels


def haar_packets(images: Tensor, level: int) -> Tensor:
    """Images [B, H, W, ch] -> their 4^level packets [B, 4^level, (H / 2^level) (W / 2^level) ch], orthonormal.

    A packet has one coefficient for each block of 2^level x 2^level pixels: the block's product with one of the Walsh
    functions, which level halvings by Haar's filters amount to. Raises ValueError for sides that blocks do not divide.
    """
    size = 2**level
    batch, height, width, channels = images.shape
    if height % size or width % size:
        raise ValueError(f"{height}x{width} images are not divisible into {size}x{size} blocks")
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=images.dtype, device=images.device) / 2**0.5
    walsh = torch.ones(1, 1, dtype=images.dtype, device=images.device)
    for _ in range(level):
        walsh = torch.kron(walsh, pair)  # [2^level, 2^level]
    blocks = images.reshape(batch, height // size, size, width // size, size, channels)
    return torch.einsum("bhywxc,uy,vx->buvhwc", blocks, walsh, walsh).reshape(batch, size * size, -1)
