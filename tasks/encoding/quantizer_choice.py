"""Choose the quantiser's range by the PSNR of the decoded calibration images (`range: auto`)."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from functa.models.field.inner import InnerLoop
from functa.models.measures.metrics import psnr_of_errors
from functa.storage.config import QuantizationConfig
from functa.storage.errors import StorageError
from functa.storage.functaset.quantizer import Quantizer, calibrate
from functa.tasks.inputs.pictures import spread

# From wide to narrow: among equals the first is chosen, which clips least.
CANDIDATES: Mapping[str, Mapping[str, str | float]] = {
    "minmax": {"range": "minmax"},
    "sigma 6": {"range": "sigma", "sigma": 6.0},
    "sigma 5": {"range": "sigma", "sigma": 5.0},
    "quantile 0.0001": {"range": "quantile", "quantile": 0.0001},
    "sigma 4": {"range": "sigma", "sigma": 4.0},
    "quantile 0.001": {"range": "quantile", "quantile": 0.001},
    "sigma 3": {"range": "sigma", "sigma": 3.0},
}

JUDGED_IMAGES = 128  # decoded for each candidate; all see the same images, so a few suffice

DECODED = 64  # at a time

FOLDS = 4


def choose_quantizer(
    config: QuantizationConfig, loop: InnerLoop, latents: Tensor, pixels: Callable[[np.ndarray], Tensor]
) -> Quantizer | None:
    """Return the quantiser for latents like these, [n, s, s, c] on the CPU; None for 32 bits.

    With range=auto it is the candidate with the best mean PSNR over images that did not set its range: each quarter of
    the latents is coded with ranges of the others, and the winner is then calibrated on all. (Ranges set by few images
    clip many values of others, which their own images would not show.) Candidates that clip more than half of
    max_clip_fraction are excluded, since shards differ; if all do, the one that clips least is chosen, and writing a
    shard will report the excess. `pixels` returns images [k, H, W, ch] in [0, 1] for rows of `latents`.
    Raises StorageError if latents are not finite, or fewer than two for range=auto.
    """
    if config.bits == 32 or config.range != "auto":
        return calibrate(config, latents.numpy())
    if len(latents) < 2:
        raise StorageError("range=auto needs two calibration images at least; set encode.calibration_images higher")
    tried = {name: _try(_with(config, name), loop, latents, pixels) for name in CANDIDATES}
    within = {name: each for name, each in tried.items() if each["clip_fraction"] <= config.max_clip_fraction / 2}
    # Compared to 0.01 dB: smaller differences are rounding, which must not choose another range on another machine.
    best = max(within, key=lambda name: round(within[name]["psnr"], 2)) if within else _least_clipping(tried)
    chosen = calibrate(_with(config, best), latents.numpy())
    assert chosen is not None
    return replace(chosen, policy=f"auto: {chosen.policy}", candidates=tried)


def _with(config: QuantizationConfig, name: str) -> QuantizationConfig:
    return config.model_copy(update=dict(CANDIDATES[name]))


def _least_clipping(tried: Mapping[str, Mapping[str, float]]) -> str:
    return min(tried, key=lambda name: tried[name]["clip_fraction"])


def _try(
    config: QuantizationConfig, loop: InnerLoop, latents: Tensor, pixels: Callable[[np.ndarray], Tensor]
) -> dict[str, float]:
    """Return {psnr, clip_fraction} of latents coded with ranges that the other folds set."""
    coded, clipped = np.empty(latents.shape, np.float32), 0
    folds = np.arange(len(latents)) % min(FOLDS, len(latents))
    for fold in np.unique(folds):
        quantizer = calibrate(config, latents[folds != fold].numpy())
        assert quantizer is not None
        codes, outside = quantizer.encode(latents[folds == fold].numpy())
        coded[folds == fold] = quantizer.decode(codes)
        clipped += outside
    judged = spread(len(latents), JUDGED_IMAGES)
    errors = [
        _errors(loop, torch.from_numpy(coded[rows]), pixels(rows))
        for rows in np.split(judged, range(DECODED, len(judged), DECODED))
    ]
    psnr = psnr_of_errors(torch.cat(errors)).mean().item()
    return {"psnr": round(psnr, 4), "clip_fraction": round(clipped / latents.numel(), 6)}


def _errors(loop: InnerLoop, z: Tensor, pixels: Tensor) -> Tensor:
    """Return the mean squared error of each image, [k], on the CPU."""
    device = next(loop.field.parameters()).device
    with torch.no_grad():
        return (loop.field(z.to(device), loop.resolution) - pixels.to(device)).square().mean((1, 2, 3)).cpu()
