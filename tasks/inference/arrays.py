"""Encode, decode, sample and classify arrays in memory: no file but those of the models is read or written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ValidationError
from torch import Tensor

from functa.models.config import Sampler
from functa.tasks.config import SampleRequest
from functa.tasks.inference.classify import BATCH, Row, classify_images, open_judge
from functa.tasks.inference.open_models import load_field
from functa.tasks.inference.ready.field import ReadyField
from functa.tasks.inference.trained_field import TrainedField, checked_pixels
from functa.tasks.inputs.given import floats

Address = str | Path

Images = np.ndarray | Tensor


def encode(
    field: TrainedField | ReadyField | Address, images: Images, *, batch: int = BATCH, device: str = "auto"
) -> np.ndarray:
    """Encode images [n, H, W, C] into latents float32 [n, s, s, c].

    Args:
        field: The result of load_field, or what it takes: a root, functaset, checkpoint folder or ready-made field.
        images: uint8 from 0 to 255 or float32 from 0 to 1, numpy or torch, of the field's resolution and channels.
        batch: Images at a time.
        device: "auto" (a GPU if there is one), "cpu" or "cuda:N".

    Raises ValueError for another shape, type or range, StorageError if no field can be loaded.

        z = functa.encode("functa-runs/digits", images)
        images_again = functa.decode("functa-runs/digits", z)
    """
    return np.asarray(_opened(field).encode(images, batch=batch, device=device))


def decode(
    field: TrainedField | ReadyField | Address,
    z: Images,
    resolution: int | None = None,
    *,
    dtype: Literal["uint8", "float32"] = "uint8",
    device: str = "auto",
) -> np.ndarray:
    """Decode latents [n, s, s, c] into images [n, resolution, resolution, C].

    Args:
        field: The result of load_field, or what it takes: a root, functaset, checkpoint folder or ready-made field.
        z: Latents, numpy or torch, as encode returns them and Functaset.load(split).dequantized() reads them.
        resolution: Pixels a side, a multiple of s; None for that of the images that the field was fitted to.
        dtype: "uint8" from 0 to 255, or "float32" about 0 to 1 and not clipped, as for computing a PSNR.
        device: "auto" (a GPU if there is one), "cpu" or "cuda:N".

    Raises ValueError for latents of another shape or a resolution that the field cannot decode at, StorageError if
    no field can be loaded.

        images = functa.decode("functa-runs/digits", z)
        larger = functa.decode("functa-runs/digits", z, resolution=64)
    """
    opened = _opened(field)
    if isinstance(opened, TrainedField):
        return opened.decode(z, resolution, dtype=dtype, device=device)
    if resolution is not None:
        raise ValueError(
            f"resolution {resolution}: this field decodes images of any size; use field.decode(z, scale=2)"
        )
    return np.asarray(opened.decode(z, dtype=dtype, device=device))


def sample(
    root: Address,
    count: int,
    *,
    label: int | str | None = None,
    guidance: float | None = None,
    sampler: Sampler | None = None,
    steps: int | None = None,
    seed: int = 0,
    resolution: int | None = None,
    device: str = "auto",
) -> np.ndarray:
    """Draw samples from a root's diffusion model: images uint8 [count, H, W, C].

    Args:
        root: A run's root with a trained diffusion model.
        count: How many.
        label: Class of all samples, by number or name; None for the classes in turn.
        guidance: Classifier-free guidance; 0 is unconditional, 1 conditional; None for that of the root's config.
        sampler: "ddpm" or "dpmpp", "heun" for models of kind edm and flow; None for that of the root's config.
        steps: Steps for each sample; None for those of the root's config.
        seed: Sample i depends on the seed and on i alone.
        resolution: Pixels a side, a multiple of s; None for that of the images that the field was fitted to.
        device: "auto" (a GPU if there is one), "cpu" or "cuda:N".

    Raises ValueError for a value out of bounds, StorageError if the root has no such model or cannot do that.

        images = functa.sample("functa-runs/digits", 16, label=3)
    """
    from functa.tasks.inference.sample import sample_batches
    from functa.tasks.inference.sample_images import prepare_samples

    try:
        request = SampleRequest(
            count=count, label=label, guidance=guidance, sampler=sampler, steps=steps, seed=seed, resolution=resolution
        )
    except ValidationError as error:
        fault = error.errors()[0]
        reason = fault["msg"].removeprefix("Value error, ")
        raise ValueError(f"{fault['loc'][0]}={fault['input']!r}: {reason}") from None
    prepared = prepare_samples(str(root), request, device)
    return np.concatenate([images for z in sample_batches(prepared.job) for images in prepared.decoded(z)])


def classify(root: Address, images: Images | Address, *, device: str = "auto") -> list[Row]:
    """Classify images; return a row {"class", "label", "probability", "top"} for each.

    class is the class's name, label its number from 0, probability is from 0 to 1, top the [name, probability] of the
    most probable classes.

    Args:
        root: A run's root with a trained classifier.
        images: [n, H, W, C] as encode takes them; or a folder of images or one image file, of any size (each row then
            has its name too, as "image", and only an "error" where it cannot be read).
        device: "auto" (a GPU if there is one), "cpu" or "cuda:N".

    Raises ValueError for another shape, type or range, StorageError: nothing trained there, no image there.

        rows = functa.classify("functa-runs/digits", images)
        print(rows[0]["class"], rows[0]["probability"])
    """
    if isinstance(images, str | Path):
        return list(classify_images(str(root), str(images), device))
    judge = open_judge(str(root), device)
    pixels = checked_pixels(images, judge.image_shape)
    parts: Sequence[Tensor] = pixels.split(BATCH) if len(pixels) else ()
    return [row for part in parts for row in judge.rows(floats(part))]


def _opened(field: TrainedField | ReadyField | Address) -> TrainedField | ReadyField:
    return load_field(field) if isinstance(field, str | Path) else field
