"""JPEG and WebP of the same images, as Pillow writes them: real files, their bytes, and what they decode to."""

import io
from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image

Codec = Literal["jpeg", "webp"]


def rate_curve(images: np.ndarray, codec: Codec, qualities: Sequence[int]) -> dict[str, dict[str, float]]:
    """Images uint8 [n, H, W, 1 or 3] -> quality -> {bpp, psnr}: bits per pixel of whole files, mean PSNR in dB.

    Of JPEG also bpp_scan: of the coded pixels alone, without the file's headers and tables, as if a set shared them.
    """
    return {str(quality): _point(images, codec, quality) for quality in sorted(set(qualities))}


def _point(images: np.ndarray, codec: Codec, quality: int) -> dict[str, float]:
    pixels = images[..., 0].size
    files = [encode(image, codec, quality) for image in images]
    decoded = np.stack([decode(data, images.shape[-1]) for data in files])
    figures = {"bpp": 8 * sum(map(len, files)) / pixels, "psnr": byte_psnr(decoded, images)}
    if codec == "jpeg":
        # Tables fitted to one image are no tables for a set: the standard ones, which code the same coefficients.
        plain = [_jpeg(image, quality, optimize=False) for image in images]
        figures["bpp_scan"] = 8 * sum(map(scan_bytes, plain)) / pixels
    return figures


def encode(image: np.ndarray, codec: Codec, quality: int) -> bytes:
    """One image uint8 [H, W, 1 or 3] as a file: JPEG with fitted Huffman tables, or lossy WebP."""
    if codec == "jpeg":
        return _jpeg(image, quality, optimize=True)
    buffer = io.BytesIO()
    _picture(image).save(buffer, "WEBP", quality=quality)
    return buffer.getvalue()


def decode(data: bytes, channels: int) -> np.ndarray:
    """A file -> uint8 [H, W, channels]."""
    with Image.open(io.BytesIO(data)) as picture:
        pixels = np.asarray(picture.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels)


def scan_bytes(data: bytes) -> int:
    """Bytes of a baseline JPEG between its start-of-scan header and its end-of-image marker."""
    start = data.index(b"\xff\xda") + 2
    return len(data) - 2 - start - int.from_bytes(data[start : start + 2], "big")


def byte_psnr(decoded: np.ndarray, originals: np.ndarray) -> float:
    """Mean over images of their PSNR in dB, uint8 [n, H, W, ch] each.

    An exact image has no finite PSNR: it counts as one with a single value off by one grey level.
    """
    difference = decoded.astype(np.float32) - originals.astype(np.float32)
    squared = (difference**2).reshape(len(originals), -1).sum(1, dtype=np.float64)  # [n]
    error = np.maximum(squared, 1) / originals[0].size
    return float((10 * np.log10(255**2 / error)).mean())


def _jpeg(image: np.ndarray, quality: int, optimize: bool) -> bytes:
    buffer = io.BytesIO()
    _picture(image).save(buffer, "JPEG", quality=quality, optimize=optimize)
    return buffer.getvalue()


def _picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
