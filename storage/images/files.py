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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from PIL import Image
    from PIL.ImageFile import ImageFile

Decoder = Literal["exact", "fast"]

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

ENDINGS = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg", ".pjp", ".webp", ".bmp", ".gif",
    ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip

NAMED_ENDINGS = 5

MAX_FILE_BYTES = 256 << 20

SCALES = (8, 4, 2)  # at which libjpeg decodes with vector instructions

SPARE = 1.4  # pixels that a fraction must leave, of those that a square needs: with less, detail is lost

ORIENTATION, UPRIGHT = 0x0112, 1  # EXIF's tag, and its value for an image that is shown as it is stored

TURNED = (2, 3, 4, 5, 6, 7, 8)

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


class Decoded:
    """One image, of which squares are made, uint8 [side, side, C].

    The decoder `exact` decodes it whole and resizes by Pillow's bicubic filter, which is antialiased. `fast` resizes by
    the same filter in vector instructions, with the same pixels on every processor, and decodes a plain JPEG at an
    eighth, a quarter or a half of its resolution where that leaves SPARE times the pixels that a square needs.
    """

    def __init__(
        self,
        size: tuple[int, int],
        decoder: "Decoder",
        decoded: Callable[[int], "Image.Image"],
        scales: tuple[int, ...] = (),
    ) -> None:
        self.size = size  # (width, height)
        self._centres: dict[int, np.ndarray] = {}  # of which ten crops may be made
        self._fast, self._decoded, self._scales = decoder == "fast", cache(decoded), scales

    @classmethod
    def of(cls, image: "Image.Image", decoder: "Decoder" = "exact") -> "Decoded":
        """Return an image that is decoded already."""
        return cls(image.size, decoder, lambda _: image)

    def square(self, side: int, box: tuple[float, float, float, float] | None = None) -> np.ndarray:
        """Return a part (left, top, right, bottom) as a square; without one, the centre: short side, then the crop.

        A square depends on its own part alone, whatever others were made of the image. Raises BadImage.
        """
        if box is None:
            if side not in self._centres:
                self._centres[side] = self._centre(side)
            return self._centres[side]
        if not self._fast:
            from PIL import Image

            # Cropping through `box` keeps the memory of a 4000 x 1 image small; bicubic is antialiased in Pillow.
            return _array(self._decoded(1).resize((side, side), Image.Resampling.BICUBIC, box=box))
        most = min(box[2] - box[0], box[3] - box[1]) / (SPARE * side)
        scale = next((scale for scale in self._scales if scale <= most), 1)
        left, top, right, bottom = (edge / scale for edge in box)
        return _array(_resized(self._decoded(scale), side, (left, top, right, bottom)))

    def _centre(self, side: int) -> np.ndarray:
        if self.size == (side, side):
            return _array(self._decoded(1))
        short = min(self.size)
        left, top = ((length - short) / 2 for length in self.size)
        return self.square(side, (left, top, left + short, top + short))


def read_image(data: bytes, channels: int, max_pixels: int, decoder: "Decoder" = "exact") -> Decoded:
    """File bytes -> an image of one channel or three. Raises BadImage: now, or where its pixels are asked for."""
    if decoder == "exact":
        return Decoded.of(decode(data, channels, max_pixels))
    with _reasons(data):
        files = [_opened(data, max_pixels)]
        size, scales = files[0].size, SCALES if _is_plain_jpeg(files[0]) else ()

    def decoded(scale: int) -> "Image.Image":
        with _reasons(data):
            return _pixels(files.pop() if files else _opened(data, max_pixels), data, channels, scale)

    if scales:
        return Decoded(size, decoder, decoded, scales)
    return Decoded.of(decoded(1), decoder)


def decode(data: bytes, channels: int, max_pixels: int) -> "Image.Image":
    """File bytes -> Pillow image of mode L (channels 1) or RGB (3). Raises BadImage."""
    with _reasons(data):
        return _pixels(_opened(data, max_pixels), data, channels)


@contextmanager
def _reasons(data: bytes) -> Iterator[None]:
    """Turn what decoding raises into BadImage."""
    try:
        yield
    except BadImage:
        raise
    except Exception as error:  # Pillow's decoders raise whatever their format's parser does
        reason = " ".join(str(error).split()).replace(str(type(data)), "")
        if "cannot identify image file" in reason:
            reason = f"not an image of a known format ({', '.join(FORMATS)})"
        raise BadImage(f"does not decode: {reason[:160] or type(error).__name__}") from None


def _opened(data: bytes, max_pixels: int) -> "ImageFile":
    """Read the header. Raises BadImage: empty, or larger than the caps."""
    from PIL import Image

    if not data:
        raise BadImage("the file is empty")
    if len(data) > MAX_FILE_BYTES:
        raise BadImage(f"{len(data)} bytes are more than a file may have ({MAX_FILE_BYTES})")
    file = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = file.size
    if width * height > max_pixels:
        raise BadImage(f"{width}x{height} pixels are more than images.max_pixels={max_pixels}")
    return file


def _pixels(file: "ImageFile", data: bytes, channels: int, scale: int = 1) -> "Image.Image":
    """Decode an opened file, a plain JPEG at 1/scale of its resolution (rounded up)."""
    with file:
        if scale > 1:
            file.draft(None, (file.width // scale, file.height // scale))
        file.load()
        _scale_transparent_level(file, data)
        image = _upright(file)
        return _in_mode(_scaled(image, file), "L" if channels == 1 else "RGB")


def _is_plain_jpeg(file: "ImageFile") -> bool:
    """Return whether a JPEG is of the kind that is decoded at a fraction: baseline, grey or YCbCr 4:4:4 to 4:2:0."""
    samplings = [(across, down) for _, across, down, _ in getattr(file, "layer", ())]
    usual = len(samplings) == 1 or (samplings[:1] in ([(1, 1)], [(2, 1)], [(2, 2)]) and samplings[1:] == [(1, 1)] * 2)
    return file.format == "JPEG" and usual and "progressive" not in file.info and _orientation(file) == UPRIGHT


def _orientation(image: "Image.Image") -> Any:
    """Return the orientation of EXIF, as it is there; of EXIF data that do not parse, None."""
    with suppress(Exception):  # that is common, and no reason to lose the image
        return image.getexif().get(ORIENTATION, UPRIGHT)
    return None


def _upright(image: "Image.Image") -> "Image.Image":
    from PIL import ImageOps

    if _orientation(image) in TURNED:  # else exif_transpose would copy it
        with suppress(Exception):
            return ImageOps.exif_transpose(image)
    return image


def _resized(image: "Image.Image", side: int, box: tuple[float, float, float, float]) -> "Image.Image":
    from cykooz_resizer import CropBox, FilterType, ResizeAlg, ResizeOptions, Resizer
    from PIL import Image

    left, top, right, bottom = box
    part = CropBox(left, top, min(right, image.width) - left, min(bottom, image.height) - top)
    square = Image.new(image.mode, (side, side))
    bicubic = ResizeAlg.convolution(FilterType.catmull_rom)
    Resizer().resize_pil(image, square, ResizeOptions(resize_alg=bicubic, crop_box=part, use_alpha=False))
    return square


def _array(image: "Image.Image") -> np.ndarray:
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


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
