"""Write image arrays as PNG files and contact sheets."""

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from functa.storage.errors import StorageError
from functa.storage.images.layout import OUTPUT_MARK
from functa.tasks.inputs.pictures import to_picture

SHEET_COLUMNS = 8

SHEET_IMAGES = 256  # at most: a sheet is one image in memory

SHEET_SIDE = 64  # pixels that small images are enlarged to, so that a person can see them

LARGEST_SIDE = 256  # and large ones are reduced to


@contextmanager
def naming_errors(out: Path) -> Iterator[None]:
    """Turn a full disk or a forbidden folder into a StorageError of one line."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{out}: cannot be written ({error.strerror or error}); choose another --out") from None


def prepare_folder(out: Path) -> None:
    """Make the folder, marked so that its images are not taken for data. Raises StorageError if it is not writable."""
    with naming_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / OUTPUT_MARK).touch()


def write_images(images: Iterable[np.ndarray], out: Path, name: str, first: int) -> None:
    for number, image in enumerate(images, start=first):
        save_png(to_picture(image), out / f"{name}{number:06d}.png")


def save_png(picture: Image.Image, path: Path) -> None:
    """Write the file at once, so that an interruption leaves no half of it."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    with naming_errors(path.parent):
        path.write_bytes(buffer.getvalue())


def tile(image: np.ndarray) -> Image.Image:
    """Scale an image for the sheet: a small one is enlarged without smoothing, a large one reduced."""
    side, picture = image.shape[0], to_picture(image).convert("RGB")
    if side > LARGEST_SIDE:
        return picture.resize((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.BOX)
    wanted = side * max(1, SHEET_SIDE // side)
    return picture.resize((wanted, wanted), Image.Resampling.NEAREST)


def contact_sheet(tiles: Sequence[Image.Image], columns: int = SHEET_COLUMNS) -> Image.Image:
    """Arrange images of one size in rows."""
    width, height = tiles[0].size
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (min(columns, len(tiles)) * (width + 4) + 4, rows * (height + 4) + 4), (128, 128, 128))
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (4 + (i % columns) * (width + 4), 4 + (i // columns) * (height + 4)))
    return sheet
