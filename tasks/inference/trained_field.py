"""A trained field with its inner loop's settings: it encodes and decodes square images of the side it was fitted to."""

import copy
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from functa.models.compute.device import choose_device
from functa.models.config import InnerConfig
from functa.models.field.field import Field
from functa.models.field.inner import InnerLoop
from functa.models.field.inner import decode as decode_latents
from functa.tasks.inference.classify import BATCH
from functa.tasks.inference.decode import DECODED_NUMBERS
from functa.tasks.inputs.given import check_range, floats, tensor_of
from functa.tasks.inputs.pictures import as_uint8


@dataclass(frozen=True, eq=False)
class TrainedField:
    """A trained field, its inner loop's settings and the side of the square images that it was fitted to."""

    module: Field
    inner: InnerConfig
    resolution: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return (H, W, C) of the images that it encodes."""
        return self.resolution, self.resolution, self.module.image_channels

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Return (s, s, c) of an image's latent."""
        return self.module.config.latent_shape

    def __repr__(self) -> str:
        image, latent = ("x".join(map(str, shape)) for shape in (self.image_shape, self.latent_shape))
        return f"TrainedField(images {image} -> latents {latent})"

    def encode(self, images: Any, *, batch: int = BATCH, device: str = "auto") -> np.ndarray:
        """Encode images [n, H, W, C] into latents float32 [n, s, s, c], as functa.encode does."""
        pixels = checked_pixels(images, self.image_shape)
        if not len(pixels):
            return np.empty((0, *self.latent_shape), np.float32)
        target = choose_device(device)
        loop = InnerLoop(_on(self.module, target), self.inner, (self.resolution, self.resolution)).prepared(len(pixels))
        return np.concatenate([loop.encode(floats(part).to(target)).cpu().numpy() for part in pixels.split(batch)])

    def decode(
        self,
        z: Any,
        resolution: int | None = None,
        *,
        dtype: Literal["uint8", "float32"] = "uint8",
        device: str = "auto",
    ) -> np.ndarray:
        """Decode latents [n, s, s, c] into images [n, resolution, resolution, C], as functa.decode does."""
        side = self.resolution if resolution is None else resolution
        self._check_side(side)
        latents = _latents(z, self.latent_shape)
        target = choose_device(device)
        module, channels = _on(self.module, target), self.image_shape[-1]
        size = max(1, DECODED_NUMBERS // (side * side * channels))
        parts = [np.empty((0, side, side, channels), dtype)]
        for part in latents.split(size) if len(latents) else ():
            decoded = decode_latents(module, part.to(target), (side, side)).cpu()
            parts.append(as_uint8(decoded) if dtype == "uint8" else decoded.float().numpy())
        return np.concatenate(parts)

    def _check_side(self, side: int) -> None:
        spatial = self.module.config.spatial
        if side < 1 or side % spatial:
            raise ValueError(f"resolution {side}: expected a multiple of {spatial}, the latent positions a side")
        try:
            self.module.check_resolution((side, side))
        except ValueError as error:
            raise ValueError(f"resolution {side}: {error}") from None


def checked_pixels(images: Any, shape: tuple[int, int, int]) -> Tensor:
    """Return the images as a tensor of uint8 or float32 on the CPU. Raises ValueError for other images."""
    pixels = tensor_of(images, "images")
    expected = f"expected [n, {', '.join(map(str, shape))}]"
    if pixels.ndim != 4 or tuple(pixels.shape[1:]) != shape:
        hint = " (one image is images[None])" if pixels.ndim == 3 else ""
        raise ValueError(f"images of shape {list(pixels.shape)}: {expected}; resize or transpose them{hint}")
    check_range(pixels)
    return pixels


def _on(module: Field, device: torch.device) -> Field:
    """Return the module itself if it is on the device, else a copy there: the caller's stays where it is."""
    if next(module.parameters()).device.type == device.type == "cpu":
        return module
    return copy.deepcopy(module).to(device)


def _latents(z: Any, shape: tuple[int, ...]) -> Tensor:
    latents = tensor_of(z, "latents")
    if latents.ndim != 4 or tuple(latents.shape[1:]) != shape or not latents.is_floating_point():
        given = f"{str(latents.dtype).removeprefix('torch.')} of shape {list(latents.shape)}"
        raise ValueError(
            f"latents {given}: expected float32 [n, {', '.join(map(str, shape))}]; pass what encode or "
            f"Functaset.load(split).dequantized() returned"
        )
    return latents.float()
