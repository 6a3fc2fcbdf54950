"""One image file's bytes into uint8 pixels, by one written-down policy, or a reason why not.

EXIF orientation is applied; transparency is composited on white; palette, CMYK and other colour spaces become RGB
(or grey by ITU-R 601); grey of more than 8 bits is scaled by its full range, not clipped, and of 16-bit colour the high
byte counts, as Pillow reads it; CMYK in a JPEG is inverted, as Adobe writes it; of an animation the first frame counts;
colour profiles are ignored. Refused: other formats than FORMATS, more pixels than the cap (read from the header, before
decoding), float and 32-bit images (their range is not known), and whatever does not decode.
"""

import io
import warnings
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image


FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

ENDINGS = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg", ".pjp", ".webp", ".bmp", ".gif",
    ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip

NAMED_ENDINGS = 5

MAX_FILE_BYTES = 256 << 20

# What Pillow would print about a file is in the row's reason, or did no harm.
warnings.filterwarnings("ignore", module=r"PIL\.")


def is_image(key: str) -> bool:
    """Return whether the key has the ending of an image; hidden files and folders do not count."""
    return key.lower().endswith(ENDINGS) and not is_hidden(key)


def is_hidden(key: str) -> bool:
    """Return whether a part of the key begins with a dot."""
    return any(part.startswith(".") for part in key.split("/"))


def left_out(keys: Iterable[str]) -> str:
    """Describe files that are not images by their endings, most frequent first; empty if there is none."""
    endings = Counter(PurePosixPath(key).suffix.lower() or "without an ending" for key in keys)
    if not endings:
        return ""
    counts = [f"{count} {ending}" for ending, count in endings.most_common(NAMED_ENDINGS)]
    counts += ["others"] if len(endings) > NAMED_ENDINGS else []
    return f"left out {sum(endings.values())} files that have no ending of an image: {', '.join(counts)}"


class BadImage(Exception):
    """An image that cannot be used; str(error) is the reason, token its version where that is known."""

    def __init__(self, reason: str, token: str = "") -> None:
        super().__init__(reason)
        self.token = token


def decode(data: bytes, channels: int, max_pixels: int) -> "Image.Image":
    """File bytes -> Pillow image of mode L (channels 1) or RGB (3). Raises BadImage."""
    from PIL import Image, ImageOps

    if not data:
        raise BadImage("the file is empty")
    if len(data) > MAX_FILE_BYTES:
        raise BadImage(f"{len(data)} bytes are more than a file may have ({MAX_FILE_BYTES})")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            width, height = file.size
            if width * height > max_pixels:
                raise BadImage(f"{width}x{height} pixels are more than images.max_pixels={max_pixels}")
            file.load()
            image: Image.Image = file
            _scale_transparent_level(image, data)
            with suppress(Exception):  # EXIF data that do not parse are common, and no reason to lose the image
                image = ImageOps.exif_transpose(image)
            return _in_mode(_scaled(image, file), "L" if channels == 1 else "RGB")
    except BadImage:
        raise
    except Exception as error:  # Pillow's decoders raise whatever their format's parser does
        reason = " ".join(str(error).split()).replace(str(type(data)), "")
        if "cannot identify image file" in reason:
            reason = f"not an image of a known format ({', '.join(FORMATS)})"
        raise BadImage(f"does not decode: {reason[:160] or type(error).__name__}") from None


def is_colour(data: bytes) -> bool:
    """Return whether the header of an image that decodes declares colours."""
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=FORMATS) as file:
        return file.mode in ("RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "P", "PA")


def _scale_transparent_level(image: "Image.Image", data: bytes) -> None:
    """Scale a PNG's transparent grey or colour to 8 bits as Pillow scales the pixels, but not this level of them."""
    level = image.info.get("transparency")
    if image.format != "PNG" or isinstance(level, bytes) or level is None:
        return
    depth = data[24]  # bits of a sample, in the header chunk, which is the first
    if image.mode in ("1", "L") and depth < 8:
        image.info["transparency"] = level * 255 // ((1 << depth) - 1)
    elif image.mode == "RGB" and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in level)


def _scaled(image: "Image.Image", file: "Image.Image") -> "Image.Image":
    """Grey of 9 to 16 bits as 8 bits, by the full range that its file declares; others as they are."""
    from PIL import Image

    netpbm = file.format == "PPM" and image.mode == "I"  # Pillow has scaled it to 16 bits
    if not (netpbm or image.mode.startswith("I;16")):
        return image
    tags = getattr(file, "tag_v2", {})  # TIFF's: 258 are the bits of a sample, 262 = 0 means that zero is white
    white = (1 << tags.get(258, (16,))[0]) - 1
    deep = np.asarray(image).astype(np.uint32)
    transparent = deep == image.info.get("transparency", -1)
    deep = white - deep if tags.get(262) == 0 else deep
    deep[transparent] = white
    return Image.fromarray(((deep * 255 + white // 2) // white).astype(np.uint8))


def _in_mode(image: "Image.Image", mode: str) -> "Image.Image":
    from PIL import Image

    if image.mode in ("I", "F"):
        raise BadImage(f"mode {image.mode} (32 bits a pixel) has no known range; save it with 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert("RGB").convert(mode)


def fit(image: "Image.Image", resolution: int) -> np.ndarray:
    """The centre square, resized to uint8 [resolution, resolution, C] (short side to `resolution`, then the crop)."""
    from PIL import Image

    width, height = image.size
    if (width, height) != (resolution, resolution):
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        # Cropping through `box` keeps the memory of a 4000 x 1 image small; bicubic is antialiased in Pillow.
        box = (left, top, left + side, top + side)
        image = image.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box)
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels
