"""Parameters and FLOPs by formula beside those of the networks themselves."""

import pytest
import torch
from torch import nn

from functa.flows.config.load import load_config
from functa.flows.config.presets import preset_names
from functa.models.config import ClassifierConfig, DenoiserConfig
from functa.models.latents.classifier import build_classifier, build_pixel_classifier
from functa.models.latents.cost import Cost, classifier_cost, denoiser_cost, pixel_classifier_cost
from functa.models.latents.denoiser import build_denoiser
from tests.helpers.forward_flops import forward_flops

Shape = tuple[int, int, int]

CLASSIFIERS: dict[str, tuple[ClassifierConfig, Shape]] = {
    "transformer": (ClassifierConfig(width=24, depth=3, heads=2), (4, 4, 6)),
    "a vector cut into tokens": (ClassifierConfig(width=24, depth=2, heads=3, token_channels=8), (1, 1, 64)),
    "hidden width that is no multiple": (ClassifierConfig(width=36, depth=1, heads=3, mlp_ratio=1.7), (2, 2, 8)),
    "mlp": (ClassifierConfig(kind="mlp", width=40, depth=4), (2, 2, 8)),
    "mlp of one layer": (ClassifierConfig(kind="mlp", width=16, depth=1), (2, 2, 8)),
}

DENOISERS: dict[str, tuple[DenoiserConfig, Shape]] = {
    "one level": (DenoiserConfig(channels=32, multipliers=(1,), blocks=1, groups=4, head_channels=8), (2, 2, 8)),
    "attention below": (
        DenoiserConfig(channels=32, multipliers=(1, 2, 3), blocks=2, attention=(2, 4), groups=8, head_channels=16),
        (8, 8, 5),
    ),
    "attention on the finest level": (
        DenoiserConfig(channels=32, multipliers=(2, 2), blocks=3, attention=(4,), groups=8, head_channels=32),
        (4, 4, 16),
    ),
    "mlp": (DenoiserConfig(kind="mlp", channels=64, blocks=3, groups=8), (1, 1, 24)),
}


def classifier_counts(config: ClassifierConfig, shape: Shape, classes: int) -> Cost:
    """Return what torch counts of the network."""
    flops = forward_flops(lambda: build_classifier(config, shape, classes), [torch.empty(1, *shape)])
    with torch.device("meta"):
        return Cost(_size(build_classifier(config, shape, classes)), flops)


def denoiser_counts(config: DenoiserConfig, shape: Shape, classes: int | None) -> Cost:
    """Return what torch counts of the network."""
    number = torch.zeros(1, dtype=torch.int64)
    inputs = [torch.empty(1, *shape), number, None if classes is None else number]
    flops = forward_flops(lambda: build_denoiser(config, shape, classes), inputs)
    with torch.device("meta"):
        return Cost(_size(build_denoiser(config, shape, classes)), flops)


def _size(network: nn.Module) -> int:
    return sum(weights.numel() for weights in network.parameters())


@pytest.mark.parametrize(("config", "shape"), CLASSIFIERS.values(), ids=CLASSIFIERS)
def test_a_classifiers_cost_is_what_torch_counts(config: ClassifierConfig, shape: Shape) -> None:
    assert classifier_cost(config, shape, 7) == classifier_counts(config, shape, 7)


@pytest.mark.parametrize("classes", [None, 7])
@pytest.mark.parametrize(("config", "shape"), DENOISERS.values(), ids=DENOISERS)
def test_a_denoisers_cost_is_what_torch_counts(config: DenoiserConfig, shape: Shape, classes: int | None) -> None:
    assert denoiser_cost(config, shape, classes) == denoiser_counts(config, shape, classes)


@pytest.mark.parametrize(("resolution", "channels"), [(4, 3), (8, 1), (28, 1), (37, 3), (64, 3)])
def test_a_pixel_classifiers_cost_is_what_torch_counts(resolution: int, channels: int) -> None:
    arguments = (24, 40, channels, resolution, 7)
    flops = forward_flops(
        lambda: build_pixel_classifier(*arguments), [torch.empty(1, resolution, resolution, channels)]
    )
    assert pixel_classifier_cost(*arguments) == Cost(_size(build_pixel_classifier(*arguments)), flops)


@pytest.mark.parametrize("name", preset_names())
def test_the_cost_of_every_presets_models_is_what_torch_counts(name: str) -> None:
    config = load_config(name)
    height, width, channels = config.field.latent_shape
    shape = (height, width, channels)
    if config.classifier is not None:
        model = config.classifier.model
        assert classifier_cost(model, shape, 10) == classifier_counts(model, shape, 10)
    if config.diffusion is not None:
        denoiser, classes = config.diffusion.model, 10 if config.diffusion.process.conditional else None
        assert denoiser_cost(denoiser, shape, classes) == denoiser_counts(denoiser, shape, classes)
