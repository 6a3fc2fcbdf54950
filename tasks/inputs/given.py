"""Check the arrays that a caller gives: images uint8 from 0 to 255 or float32 from 0 to 1, numpy or torch."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor


def tensor_of(values: Any, name: str) -> Tensor:
    """Return an array or a tensor as a tensor on the CPU. Raises ValueError for anything else."""
    if isinstance(values, Tensor):
        return values.detach().cpu()
    if not isinstance(values, np.ndarray):
        raise ValueError(f"{name} of type {type(values).__name__}: expected a numpy array or a torch tensor")
    try:
        whole = np.ascontiguousarray(values)
        return torch.from_numpy(whole if whole.flags.writeable else whole.copy())  # torch warns of what Pillow gives
    except TypeError:
        raise ValueError(f"{name} of type {values.dtype}: expected uint8 or float32; convert them") from None


def check_range(pixels: Tensor) -> None:
    """Raise ValueError unless pixels are uint8, or float32 from 0 to 1."""
    if pixels.dtype not in (torch.uint8, torch.float32):
        name = str(pixels.dtype).removeprefix("torch.")
        raise ValueError(f"images of type {name}: expected uint8 from 0 to 255 or float32 from 0 to 1; convert them")
    if pixels.dtype == torch.float32 and pixels.numel():
        low, high = float(pixels.min()), float(pixels.max())
        if math.isnan(low):  # torch's minimum is NaN if any number is
            raise ValueError("float32 images contain NaN: expected numbers from 0 to 1; replace those")
        if low < 0 or high > 1:
            raise ValueError(f"float32 images from {low:g} to {high:g}: expected 0 to 1; rescale them")


def floats(pixels: Tensor) -> Tensor:
    """Return checked pixels as float32 from 0 to 1."""
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
