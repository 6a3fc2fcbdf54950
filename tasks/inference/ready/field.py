"""A field that codes each patch alone, for images of any size: the same weights at every position of the grid."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from functa.models.compute.compilation import should_compile
from functa.models.compute.device import choose_device
from functa.models.config import InnerConfig
from functa.models.field.cost import encode_passes, forward_flops
from functa.models.field.field import Field
from functa.models.field.inner import InnerLoop
from functa.models.measures.metrics import image_errors
from functa.storage.errors import StorageError
from functa.storage.places.address import open_location
from functa.tasks.inference.ready import shipped
from functa.tasks.inputs.given import check_range, floats, tensor_of
from functa.tasks.inputs.pictures import as_uint8

BATCH = 64

PIECE = 4096  # patches that a call of the inner loop takes; of equal pieces there is one compiled graph

WHOLE = 256  # patches are filled up to a multiple of this where they are fewer: its divisors make equal chunks


@dataclass(frozen=True, eq=False)
class ReadyField:
    """A field of single patches with its inner loop's settings: it encodes and decodes images of any size.

    Latents are [h, w, c] for an image of h x w patches; sides that the patch does not divide are filled up with the
    pixels at the border, which `size` cuts off again.

        field = functa.load_field("photo_p8c64")
        z = field.encode(image)                              # uint8 [H, W, 3] -> float32 [h, w, 64]
        again = field.decode(z, size=image.shape[:2])        # and back
    """

    name: str
    module: Field
    inner: InnerConfig
    patch: int
    digest: str

    @property
    def channels(self) -> int:
        """Return the numbers of a latent position, c."""
        return self.module.config.channels

    @property
    def image_channels(self) -> int:
        """Return the channels of the images: 3 for colour, 1 for grey."""
        return self.module.image_channels

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the latent positions (h, w) of an image of so many pixels."""
        return -(-height // self.patch), -(-width // self.patch)

    def __repr__(self) -> str:
        sides = f"{self.patch}x{self.patch}x{self.image_channels}"
        return f"ReadyField('{self.name}': each {sides} pixels -> {self.channels} numbers)"

    def encode(self, images: Any, *, steps: int | None = None, batch: int = BATCH, device: str = "auto") -> Any:
        """Encode images into latents float32.

        Args:
            images: One image [H, W, C] -> [h, w, c]; several of one size [n, H, W, C] -> [n, h, w, c]; or a list of
                images of any sizes -> a list. uint8 from 0 to 255 or float32 from 0 to 1, numpy or torch.
            steps: Inner gradient steps; None for as many as the field was trained with.
            batch: Images of one size at a time.
            device: "auto" (a GPU if there is one), "cpu" or "cuda:N".

        Raises ValueError for another type, range or number of channels, and for an image smaller than a patch.
        """
        several = isinstance(images, list | tuple)
        pixels = [self._pixels(image) for image in (images if several else [images])]
        coder = self.coder(device, steps, sum(image.numel() for image in pixels))
        latents = [self._encoded(coder, image, batch) for image in pixels]
        return latents if several else latents[0]

    def decode(
        self,
        z: Any,
        size: Sequence[int] | None = None,
        *,
        scale: int = 1,
        dtype: Literal["uint8", "float32"] = "uint8",
        device: str = "auto",
    ) -> Any:
        """Decode latents [h, w, c] or [n, h, w, c] into images [H, W, C] or [n, H, W, C]; a list into a list.

        Args:
            z: Latents, numpy or torch, as encode returns them.
            size: (height, width) of the images that were encoded; None for all pixels of the grid. With a list of
                latents a list of sizes.
            scale: How many times as many pixels a side.
            dtype: "uint8" from 0 to 255, or "float32" about 0 to 1 and not clipped, as for computing a PSNR.
            device: "auto" (a GPU if there is one), "cpu" or "cuda:N".

        Raises ValueError for latents of another shape, or a size that is not of their grid.
        """
        if isinstance(z, list | tuple):
            sizes: Sequence[Any] = [None] * len(z) if size is None else list(size)
            each = zip(z, sizes, strict=True)
            return [self.decode(one, own, scale=scale, dtype=dtype, device=device) for one, own in each]
        latents = tensor_of(z, "latents")
        if latents.ndim not in (3, 4) or latents.shape[-1] != self.channels or not latents.is_floating_point():
            raise ValueError(
                f"latents of shape {list(latents.shape)}: expected float32 [h, w, {self.channels}] or "
                f"[n, h, w, {self.channels}], as encode returns them"
            )
        if scale < 1:
            raise ValueError(f"scale {scale}: expected a whole number from 1 on")
        batch = latents.float() if latents.ndim == 4 else latents.float()[None]
        grid = (batch.shape[1], batch.shape[2])
        height, width = (side * self.patch for side in grid) if size is None else (int(side) for side in size)
        if self.grid(height, width) != grid:
            raise ValueError(
                f"size {height}x{width}: {grid[0]}x{grid[1]} latent positions of {self.patch} pixels are of another "
                f"size; give the (height, width) of the image that was encoded"
            )
        decoded = self.coder(device).decode(batch, (height, width), scale)
        images = as_uint8(decoded) if dtype == "uint8" else decoded.numpy()
        return images if latents.ndim == 4 else images[0]

    def coder(self, device: str = "auto", steps: int | None = None, values: int = 0) -> "Coder":
        """Return the field ready to encode about so many pixel values on a device. Raises ValueError."""
        inner = self.inner.model_copy(update={} if steps is None else {"steps": steps})
        target, sides = choose_device(device), (self.patch, self.patch)
        one = forward_flops(self.module.config, sides, self.image_channels)
        patches = values / (self.patch**2 * self.image_channels)
        compiled, _ = should_compile(inner.compile, encode_passes(inner) * one * patches, target)
        loop = InnerLoop(copy.deepcopy(self.module).to(target), inner, sides, compiled)
        return Coder(loop.prepared(PIECE), self.patch)

    def _encoded(self, coder: "Coder", image: Tensor, batch: int) -> np.ndarray:
        if image.ndim == 3:
            return coder.encode(image[None])[0].numpy()
        parts = [coder.encode(part).numpy() for part in (image.split(batch) if len(image) else ())]
        return np.concatenate([np.empty((0, *self.grid(*image.shape[1:3]), self.channels), np.float32), *parts])

    def _pixels(self, image: Any) -> Tensor:
        pixels = tensor_of(image, "images")
        shape = list(pixels.shape)
        if pixels.ndim not in (3, 4) or pixels.shape[-1] != self.image_channels:
            grey = self.image_channels == 3 and pixels.ndim in (3, 4) and pixels.shape[-1] == 1
            hint = "; images.repeat(3, axis=-1) makes colour images of grey ones" if grey else ""
            raise ValueError(
                f"images of shape {shape}: expected [H, W, {self.image_channels}] or [n, H, W, {self.image_channels}]"
                f"{hint}"
            )
        if min(pixels.shape[-3:-1]) < self.patch:
            raise ValueError(
                f"images of {shape[-3]}x{shape[-2]} pixels: smaller than the field's patch of {self.patch}x{self.patch}"
            )
        check_range(pixels)
        return pixels


@dataclass(frozen=True, eq=False)
class Coder:
    """A field of single patches on a device, with its first inner step computed."""

    loop: InnerLoop
    patch: int

    @property
    def device(self) -> torch.device:
        """Return where it computes."""
        return next(self.loop.field.parameters()).device

    def encode(self, images: Tensor) -> Tensor:
        """Encode images [n, H, W, C], uint8 or float32 in [0, 1] -> latents [n, h, w, c] on the CPU."""
        padded = padded_images(floats(images), self.patch)
        z = torch.cat([self._latents(part) for part in self._cut(padded).split(PIECE)])
        return z.reshape(len(images), padded.shape[1] // self.patch, padded.shape[2] // self.patch, -1)

    def _latents(self, patches: Tensor) -> Tensor:
        """Encode patches [N, p, p, C] -> [N, c]."""
        whole = self._filled(patches)
        return self.loop.encode(whole.to(self.device)).reshape(len(whole), -1)[: len(patches)].cpu()

    def errors(self, z: Tensor, images: Tensor) -> Tensor:
        """Return the mean squared error [n] of latents [n, h, w, c] over the images' own pixels [n, H, W, C]."""
        height, width = images.shape[1:3]
        if height % self.patch or width % self.patch:
            return image_errors(self.decode(z, (height, width)), floats(images))
        flat, patches = z.flatten(0, 2), self._cut(floats(images))
        parts = [self._errors(*part) for part in zip(flat.split(PIECE), patches.split(PIECE), strict=True)]
        return torch.cat(parts).reshape(len(z), -1).mean(1)

    def _errors(self, z: Tensor, patches: Tensor) -> Tensor:
        whole, target = self._filled(patches), self._filled(z)
        return self.loop.errors_at(whole.to(self.device), target[:, None, None].to(self.device))[: len(z)].cpu()

    def _cut(self, images: Tensor) -> Tensor:
        """Cut images [n, H, W, C] of whole patches into patches [n h w, p, p, C]."""
        count, height, width, channels = images.shape
        p, h, w = self.patch, height // self.patch, width // self.patch
        return images.reshape(count, h, p, w, p, channels).transpose(2, 3).reshape(-1, p, p, channels)

    def _filled(self, rows: Tensor) -> Tensor:
        """Repeat the last of a piece's rows: equal pieces make equal chunks, and one compiled graph."""
        short = -len(rows) % (PIECE if self.loop.compiled else WHOLE)
        return torch.cat([rows, rows[-1:].expand(short, *rows.shape[1:])]) if short else rows

    def decode(self, z: Tensor, size: tuple[int, int], scale: int = 1) -> Tensor:
        """Decode latents [n, h, w, c] -> float images [n, H scale, W scale, C], unclamped, on the CPU."""
        count, h, w, channels = z.shape
        side = self.patch * scale
        with torch.no_grad():
            decoded = self.loop.field(z.reshape(-1, 1, 1, channels).to(self.device), (side, side)).cpu()
        images = decoded.reshape(count, h, w, side, side, -1).transpose(2, 3).reshape(count, h * side, w * side, -1)
        return images[:, : size[0] * scale, : size[1] * scale]


def padded_images(images: Tensor, patch: int) -> Tensor:
    """Fill images [n, H, W, C] up to whole patches at the bottom and on the right with the pixels at the border."""
    height, width = images.shape[1:3]
    rows, columns = (torch.arange(-(-side // patch) * patch).clamp(max=side - 1) for side in (height, width))
    return images if (len(rows), len(columns)) == (height, width) else images[:, rows][:, :, columns]


def ready_field(name: str, field: Field, inner: InnerConfig, resolution: int, digest: str) -> ReadyField:
    """Return the field of single patches that a trained field is. Raises StorageError for one that ties them."""
    config = field.config
    if not config.independent or config.coordinates != "patch" or (inner.rates == "element" and config.spatial > 1):
        raise StorageError(
            f"{name}: its patches are not all coded alike and alone, so it knows images of one size only; a field for "
            f"any size needs field.interpolation=nearest, field.kernel=1, field.coordinates=patch and inner.rates="
            f"channel"
        )
    tensors = dict(field.state_dict())
    if inner.loss == "image" and config.spatial > 1:  # the mean over the image is s^2 times smaller: so are the steps
        tensors["rates"] = tensors["rates"] / config.positions
        clip = inner.rates_clip and tuple(rate / config.positions for rate in inner.rates_clip)
        inner = inner.model_copy(update={"rates_clip": clip})
    inner = inner.model_copy(update={"loss": "patch"})
    return _built(name, config.model_copy(update={"spatial": 1}), inner, field.image_channels, tensors,
                  resolution // config.spatial, digest)  # fmt: skip


def _built(
    name: str, config: Any, inner: InnerConfig, channels: int, tensors: dict[str, Tensor], patch: int, digest: str
) -> ReadyField:
    module = Field(config, inner, channels)
    module.load_state_dict(tensors)
    return ReadyField(name, module.requires_grad_(False), inner, patch, digest)


def open_pair(text: str) -> ReadyField | None:
    """Open a shipped field by its name, or a pair of files by the path of either; None for another location.

    Raises UnknownField for what can only be a name and is none, StorageError for a damaged pair.
    """
    if shipped.is_shipped(text):
        record, (folder, stem) = shipped.find(text), (open_location(shipped.FOLDER), text)
    else:
        pair = shipped.pair_of(text)
        if pair is None:
            return None
        folder, stem = pair
        record = shipped.read_record(folder, stem)
    tensors = {key: torch.from_numpy(value) for key, value in shipped.read_tensors(folder, stem, record).items()}
    return _built(record.name, record.field, record.inner, record.image_channels, tensors, record.patch, record.digest)
