"""Pictures as bytes: errors made visible, enlargement without smoothing, strips, PNG, data URIs. Pillow and numpy."""

import base64
import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from functa.tasks.report.blocks import Pixels

AMPLIFICATIONS = (32, 16, 8, 4, 2, 1)

PIXEL_ART = 64  # Pictures up to this side are enlarged by repeating pixels, never smoothed.


def amplification(originals: Pixels, reconstructions: Pixels) -> int:
    """Return the factor for showing errors of pictures [n, H, W, C]: as large as clips no more than 1 % of them."""
    high = float(np.percentile(_difference(originals, reconstructions), 99))
    return next((factor for factor in AMPLIFICATIONS if high * factor <= 255), 1)


def errors(originals: Pixels, reconstructions: Pixels, factor: int) -> Pixels:
    """Return the absolute error times factor, clipped; black is no error."""
    return np.minimum(_difference(originals, reconstructions) * factor, 255).astype(np.uint8)


def psnr(originals: Pixels, reconstructions: Pixels) -> npt.NDArray[np.float64]:
    """Return the PSNR of 8-bit pictures, [n] in dB; infinite for equal pictures."""
    error = _difference(originals, reconstructions).astype(np.float64) / 255
    mean = (error**2).reshape(len(error), -1).mean(axis=1)
    with np.errstate(divide="ignore"):
        return np.asarray(-10 * np.log10(mean), dtype=np.float64)


def fit(image: Pixels, at_least: int, at_most: int) -> Pixels:
    """Return a picture [H, W, C] scaled so that its long side is in [at_least, at_most].

    Enlarged by whole factors (repeated pixels), reduced by area averages.
    """
    long = max(image.shape[:2])
    if long > at_most:
        height, width = (max(1, round(n * at_most / long)) for n in image.shape[:2])
        return _channels(np.asarray(_pillow(image).resize((width, height), Image.Resampling.BOX)))
    factor = max(1, min(-(-at_least // long), at_most // long))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def strip(images: Pixels, side: int, gap: int = 4) -> Pixels:
    """Join pictures [n, H, W, C] in a row [h, n w + gaps, C], grey between them; each about `side` pixels."""
    pixel_art = max(images.shape[1:3]) <= side
    tiles = [fit(image, side if pixel_art else 1, side) for image in images]
    grey = np.full((tiles[0].shape[0], gap, tiles[0].shape[2]), 128, np.uint8)  # seen on light and dark pages
    parts = [part for tile in tiles for part in (tile, grey)][:-1]
    return np.concatenate(parts, axis=1)


def png(image: Pixels) -> bytes:
    """Return a picture [H, W, 1 or 3] as PNG."""
    buffer = io.BytesIO()
    _pillow(image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def data_uri(content: bytes) -> str:
    """Return a PNG file as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _difference(originals: Pixels, reconstructions: Pixels) -> npt.NDArray[np.int64]:
    if originals.shape != reconstructions.shape:
        raise ValueError(f"originals {originals.shape} and reconstructions {reconstructions.shape} differ in shape")
    return np.abs(originals.astype(np.int64) - reconstructions.astype(np.int64))


def _pillow(image: Pixels) -> Image.Image:
    if image.ndim != 3 or image.shape[2] not in (1, 3) or image.dtype != np.uint8:
        raise ValueError(f"a picture is uint8 [H, W, 1 or 3], not {image.dtype} {list(image.shape)}")
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def _channels(image: Pixels) -> Pixels:
    return image[:, :, None] if image.ndim == 2 else image
