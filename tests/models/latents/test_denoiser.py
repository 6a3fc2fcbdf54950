"""The denoiser against ADM's parameter counts, its start, and the configurations it refuses."""

from typing import Any

import pytest
import torch
from torch import nn

from functa.models.config import DenoiserConfig
from functa.models.latents.denoiser import build_denoiser, time_numbers

U8, U4 = (8, 8, 16), (4, 4, 64)


def adm(blocks: int, multipliers: tuple[int, ...], attention: tuple[int, ...] = ()) -> DenoiserConfig:
    return DenoiserConfig(channels=320, multipliers=multipliers, blocks=blocks, attention=attention)


@pytest.mark.parametrize(
    ("config", "latent_shape", "classes", "millions"),
    [
        (adm(1, (1, 1), (4,)), U8, None, 34.949),
        (adm(2, (2, 2)), U8, None, 157.153),  # Table 6 writes (2,), which is no level
        (adm(2, (2, 2)), U4, None, 157.706),
        (adm(2, (2, 2), (4,)), U4, None, 165.917),
        (adm(3, (2, 2, 2), (8,)), U8, 10, 312.920),
        (adm(3, (2, 2, 2), (8, 4)), U8, 10, 324.415),
        (adm(3, (2, 2), (4,)), U4, 10, 214.296),
        (adm(3, (2, 2, 2), (4, 2)), U4, 10, 324.968),
        (adm(2, (1, 2, 2, 2), (8, 16)), (32, 32, 64), 1000, 277.402),  # ImageNet: the paper's 277M
    ],
)
def test_parameter_counts_of_table_6_and_imagenet(config, latent_shape, classes, millions) -> None:
    """Those that Dhariwal and Nichol's own code gives, to the last parameter."""
    with torch.device("meta"):
        model = build_denoiser(config, latent_shape, classes)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.0006)


def test_the_time_is_embedded_as_adms_where_the_finest_level_is_wider() -> None:
    unet: Any = build_denoiser(small(multipliers=(2, 2)), (4, 4, 3), None).unet
    t = torch.tensor([0.0, 3.5, 999.0])
    angle = t[:, None] * 10_000 ** (-torch.arange(16) / 16)  # 32 numbers for 32 base channels
    torch.testing.assert_close(unet.time_proj(t), torch.cat([angle.cos(), angle.sin()], 1), rtol=0, atol=1e-3)
    assert unet.time_embedding.linear_1.weight.shape == (128, 32)
    wider = build_denoiser(small(multipliers=(2, 2)), (4, 4, 3), None, 64)  # as earlier versions had it
    assert (time_numbers(wider.state_dict()), time_numbers({})) == (64, None)


def small(**changes: object) -> DenoiserConfig:
    return DenoiserConfig(**{"channels": 32, "multipliers": (1, 2), "head_channels": 32, **changes})


@pytest.mark.parametrize(
    ("config", "latent_shape"),
    [
        (small(channels=64), (2, 2, 8)),  # ends at 1x1
        (small(attention=(2,)), (4, 4, 3)),
        (small(multipliers=(1, 2, 2)), (4, 4, 3)),  # ends at 1x1 as Table 6, last row
        (small(channels=64, multipliers=(1,)), (1, 1, 24)),  # vector functa
    ],
)
def test_noise_has_the_latents_shape_and_starts_at_zero(config, latent_shape) -> None:
    torch.manual_seed(0)
    model = build_denoiser(config, latent_shape, 10).eval()
    x = torch.randn(2, *latent_shape)
    eps = model(x, torch.tensor([0, 999]), torch.tensor([3, 10]))  # 10: the dummy
    assert eps.shape == x.shape
    assert eps.abs().max() == 0


MLP = DenoiserConfig(kind="mlp", channels=64, blocks=3)


@pytest.mark.parametrize("classes", [None, 10])
def test_the_residual_mlp_has_the_parameters_of_its_layers(classes: int | None) -> None:
    width, numbers = 64, 24
    block = 2 * 2 * width + 2 * (width**2 + width) + width**2 + width  # norms, linears, time
    expected = (256 * width + width) + (width**2 + width) + (numbers * width + width) + 3 * block
    expected += 2 * width + width * numbers + numbers + (0 if classes is None else (classes + 1) * width)
    with torch.device("meta"):
        model = build_denoiser(MLP, (1, 1, numbers), classes)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_the_residual_mlp_starts_at_zero_and_sees_time_and_label() -> None:
    torch.manual_seed(0)
    x, t, labels = torch.randn(3, 1, 1, 24), torch.tensor([5, 500, 999]), torch.tensor([1, 2, 10])
    model = build_denoiser(MLP, (1, 1, 24), 10).eval()
    assert model(x, t, labels).shape == x.shape
    assert model(x, t, labels).abs().max() == 0
    eps = _awake(model)(x, t, labels)
    assert (eps - model(x, t + 1 - 2 * (t > 900), labels)).abs().amax((1, 2, 3)).min() > 1e-6
    assert (eps - model(x, t, torch.tensor([4, 5, 6]))).abs().amax((1, 2, 3)).min() > 1e-6
    torch.testing.assert_close(model(x[1:2], t[1:2], labels[1:2]), eps[1:2], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="always wants them"):
        model(x, t)
    with pytest.raises(ValueError, match="labels are for a conditional denoiser"):
        build_denoiser(MLP, (1, 1, 24), None)(x, t, labels)


def _awake(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=0.05)
    return model.eval()


def test_timestep_and_label_reach_the_noise_and_samples_do_not_mix() -> None:
    torch.manual_seed(0)
    model = _awake(build_denoiser(small(attention=(4,)), (4, 4, 3), 10))
    x, t, labels = torch.randn(3, 4, 4, 3), torch.tensor([5, 500, 999]), torch.tensor([1, 2, 10])
    eps = model(x, t, labels)
    assert (eps - model(x, t + 1 - 2 * (t > 900), labels)).abs().amax((1, 2, 3)).min() > 1e-6
    assert (eps - model(x, t, torch.tensor([4, 5, 6]))).abs().amax((1, 2, 3)).min() > 1e-6
    torch.testing.assert_close(model(x[1:2], t[1:2], labels[1:2]), eps[1:2], rtol=1e-4, atol=1e-5)


def test_labels_are_wanted_exactly_where_there_are_classes() -> None:
    x, t, labels = torch.randn(1, 2, 2, 3), torch.tensor([1]), torch.tensor([1])
    labelled, plain = (build_denoiser(small(channels=64), (2, 2, 3), classes) for classes in (10, None))
    with pytest.raises(ValueError, match="class_labels"):
        labelled(x, t, None)
    with pytest.raises(ValueError, match="class"):
        plain(x, t, labels)
    assert plain(x, t).shape == x.shape


@pytest.mark.parametrize(
    ("config", "latent_shape", "fault"),
    [
        (small(attention=(2,)), U8, "attention: resolution 2 is no level of this UNet: choose among 8, 4"),
        (small(multipliers=(1, 2, 2)), (6, 6, 3), "s = 6 is not divisible by 4"),
        (small(head_channels=64, attention=(4,)), (4, 4, 3), "32 channels, which are no multiple of 64"),
        (small(multipliers=(2, 1)), (2, 2, 3), "ends at 1x1"),
        (small(multipliers=(1, 2)), (2, 2, 3), "ends at 1x1"),
    ],
)
def test_a_unet_that_does_not_fit_the_latent_is_refused_in_one_line(config, latent_shape, fault) -> None:
    with pytest.raises(ValueError, match=fault) as caught:
        build_denoiser(config, latent_shape, None)
    assert "\n" not in str(caught.value)
