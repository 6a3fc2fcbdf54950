"""Encode, decode, sample and classify arrays in memory: no file but those of the models is read or written."""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from functa.models.compute.device import choose_device
from functa.models.field.field import Field
from functa.models.field.inner import InnerLoop
from functa.models.field.inner import decode as decode_latents
from functa.tasks.config import SampleRequest
from functa.tasks.inference.classify import BATCH, Row, classify_images, open_judge
from functa.tasks.inference.decode import DECODED_NUMBERS
from functa.tasks.inference.open_models import TrainedField, load_field
from functa.tasks.inputs.pictures import as_uint8

Address = str | Path

Images = np.ndarray | Tensor


def encode(field: TrainedField | Address, images: Images, *, batch: int = BATCH, device: str = "auto") -> np.ndarray:
    """Encode images [n, H, W, C] into latents float32 [n, s, s, c].

    Args:
        field: The result of load_field, or the root, functaset or checkpoint folder to load it from.
        images: uint8 from 0 to 255 or float32 from 0 to 1, numpy or torch, of the field's resolution and channels.
        batch: Images at a time.
        device: "auto" (a GPU if there is one), "cpu" or "cuda:N".

    Raises ValueError for another shape, type or range, StorageError if no field can be loaded.

        z = functa.encode("functa-runs/digits", images)
        images_again = functa.decode("functa-runs/digits", z)
    """
    opened = _opened(field)
    pixels = _pixels(images, opened.image_shape)
    if not len(pixels):
        return np.empty((0, *opened.latent_shape), np.float32)
    target = choose_device(device)
    resolution = (opened.resolution, opened.resolution)
    loop = InnerLoop(_on(opened.module, target), opened.inner, resolution).prepared(len(pixels))
    return np.concatenate([loop.encode(_floats(part).to(target)).cpu().numpy() for part in pixels.split(batch)])


def decode(
    field: TrainedField | Address,
    z: Images,
    resolution: int | None = None,
    *,
    dtype: Literal["uint8", "float32"] = "uint8",
    device: str = "auto",
) -> np.ndarray:
    """Decode latents [n, s, s, c] into images [n, resolution, resolution, C].

    Args:
        field: The result of load_field, or the root, functaset or checkpoint folder to load it from.
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
    side = opened.resolution if resolution is None else resolution
    _check_side(opened, side)
    latents = _latents(z, opened.latent_shape)
    target = choose_device(device)
    module, channels = _on(opened.module, target), opened.image_shape[-1]
    size = max(1, DECODED_NUMBERS // (side * side * channels))
    parts = [np.empty((0, side, side, channels), dtype)]
    for part in latents.split(size) if len(latents) else ():
        decoded = decode_latents(module, part.to(target), (side, side)).cpu()
        parts.append(as_uint8(decoded) if dtype == "uint8" else decoded.float().numpy())
    return np.concatenate(parts)


def sample(
    root: Address,
    count: int,
    *,
    label: int | str | None = None,
    guidance: float | None = None,
    sampler: Literal["ddpm", "dpmpp"] | None = None,
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
        sampler: "ddpm" or "dpmpp"; None for that of the root's config.
        steps: Denoiser calls for each sample; None for those of the root's config.
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
    pixels = _pixels(images, judge.image_shape)
    parts: Sequence[Tensor] = pixels.split(BATCH) if len(pixels) else ()
    return [row for part in parts for row in judge.rows(_floats(part))]


def _opened(field: TrainedField | Address) -> TrainedField:
    return field if isinstance(field, TrainedField) else load_field(field)


def _on(module: Field, device: torch.device) -> Field:
    """Return the module itself if it is on the device, else a copy there: the caller's stays where it is."""
    if next(module.parameters()).device.type == device.type == "cpu":
        return module
    return copy.deepcopy(module).to(device)


def _pixels(images: Images, shape: tuple[int, int, int]) -> Tensor:
    """Return the images as a tensor of uint8 or float32 on the CPU. Raises ValueError for other images."""
    pixels = _tensor(images, "images")
    expected = f"expected [n, {', '.join(map(str, shape))}]"
    if pixels.ndim != 4 or tuple(pixels.shape[1:]) != shape:
        raise ValueError(f"images of shape {list(pixels.shape)}: {expected}; resize or transpose them{_hint(pixels)}")
    if pixels.dtype not in (torch.uint8, torch.float32):
        name = str(pixels.dtype).removeprefix("torch.")
        raise ValueError(f"images of type {name}: expected uint8 from 0 to 255 or float32 from 0 to 1; convert them")
    if pixels.dtype == torch.float32 and len(pixels):
        low, high = float(pixels.min()), float(pixels.max())
        if math.isnan(low):  # torch's minimum is NaN if any number is
            raise ValueError("float32 images contain NaN: expected numbers from 0 to 1; replace those")
        if low < 0 or high > 1:
            raise ValueError(f"float32 images from {low:g} to {high:g}: expected 0 to 1; rescale them")
    return pixels


def _hint(pixels: Tensor) -> str:
    return " (one image is images[None])" if pixels.ndim == 3 else ""


def _floats(pixels: Tensor) -> Tensor:
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels


def _latents(z: Images, shape: tuple[int, ...]) -> Tensor:
    latents = _tensor(z, "latents")
    if latents.ndim != 4 or tuple(latents.shape[1:]) != shape or not latents.is_floating_point():
        given = f"{str(latents.dtype).removeprefix('torch.')} of shape {list(latents.shape)}"
        raise ValueError(
            f"latents {given}: expected float32 [n, {', '.join(map(str, shape))}]; pass what encode or "
            f"Functaset.load(split).dequantized() returned"
        )
    return latents.float()


def _tensor(values: Any, name: str) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach().cpu()
    if not isinstance(values, np.ndarray):
        raise ValueError(f"{name} of type {type(values).__name__}: expected a numpy array or a torch tensor")
    try:
        return torch.from_numpy(np.ascontiguousarray(values))
    except TypeError:
        raise ValueError(f"{name} of type {values.dtype}: expected uint8 or float32; convert them") from None


def _check_side(field: TrainedField, side: int) -> None:
    spatial = field.module.config.spatial
    if side < 1 or side % spatial:
        raise ValueError(f"resolution {side}: expected a multiple of {spatial}, the latent positions a side")
    try:
        field.module.check_resolution((side, side))
    except ValueError as error:
        raise ValueError(f"resolution {side}: {error}") from None
