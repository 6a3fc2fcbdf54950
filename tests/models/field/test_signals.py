"""Signals on one and three axes, which the paper names next: a real waveform, a small film made of a photograph."""

from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor

from functa.models.config import FieldConfig, InnerConfig
from functa.models.field.field import Field
from functa.models.field.inner import InnerLoop
from functa.models.measures.metrics import psnr_of_errors


def membrane_voltage() -> Tensor:
    """A recorded membrane voltage that comes with matplotlib, cut into signals [n, 64, 1] in [0, 1]."""
    path = Path(matplotlib.get_data_path(), "sample_data", "membrane.dat")
    voltage = torch.from_numpy(np.fromfile(path, np.float32))
    voltage = (voltage - voltage.min()) / (voltage.max() - voltage.min())
    return voltage[: len(voltage) // 64 * 64].reshape(-1, 64, 1)


def panned_photographs() -> Tensor:
    """Films [n, 4, 8, 8, 3]: a window that moves one pixel a frame over scikit-learn's photographs."""
    from sklearn.datasets import load_sample_images

    films = []
    for photograph in load_sample_images().images:
        pixels = torch.from_numpy(np.ascontiguousarray(photograph[::4, ::4])).float() / 255
        for top in range(0, pixels.shape[0] - 8, 12):
            for left in range(0, pixels.shape[1] - 12, 12):
                films.append(torch.stack([pixels[top : top + 8, left + t : left + t + 8] for t in range(4)]))
    return torch.stack(films)


def gain(signals: Tensor, config: FieldConfig, steps: int, rate: float) -> tuple[float, float]:
    """(PSNR on held-out signals after a short training, PSNR of the training signals' mean)."""
    order = torch.randperm(len(signals), generator=torch.Generator().manual_seed(0))
    test, training = signals[order[:32]], signals[order[32:]]
    inner = InnerConfig()
    resolution = tuple(signals.shape[1:-1])
    field = Field(config, inner, signals.shape[-1], seed=1, resolution=resolution)
    loop = InnerLoop(field, inner, resolution)
    optimizer = torch.optim.Adam(field.parameters(), lr=rate)
    for step in range(steps):
        optimizer.zero_grad()
        loop.outer_backward(training[torch.arange(step * 32, step * 32 + 32) % len(training)])
        torch.nn.utils.clip_grad_norm_(field.parameters(), 1.0)
        optimizer.step()
    assert loop.encode(test).shape == (32, *config.latent_shape)
    flat = (test - training.mean(0)).square().flatten(1).mean(1)
    return psnr_of_errors(loop.errors(test)).mean().item(), psnr_of_errors(flat).mean().item()


def test_a_waveform_is_encoded_with_a_quarter_of_its_numbers() -> None:
    config = FieldConfig(axes=1, spatial=4, channels=4, width=32, depth=4)
    fitted, mean = gain(membrane_voltage(), config, steps=150, rate=3e-3)
    assert fitted > mean + 6


def test_a_film_is_encoded_with_a_sixth_of_its_numbers() -> None:
    config = FieldConfig(axes=3, spatial=2, channels=16, width=32, depth=4)
    fitted, mean = gain(panned_photographs(), config, steps=100, rate=3e-3)
    assert fitted > mean + 6


def test_a_waveform_with_interpolation_and_a_wider_map() -> None:
    config = FieldConfig(axes=1, spatial=4, channels=4, width=32, depth=4, interpolation="bilinear", kernel=3)
    fitted, mean = gain(membrane_voltage(), config, steps=100, rate=3e-3)
    assert fitted > mean + 4
