"""EDM and rectified flow against diffusers' preconditioning, and data whose samples and losses have closed forms."""

import math
from typing import Any

import pytest
import torch
from diffusers import EDMEulerScheduler, FlowMatchHeunDiscreteScheduler
from torch import Tensor

from functa.models.compute.randomness import gaussian_noise
from functa.models.config import DiffusionConfig
from functa.models.latents.continuous import SIGMA_MAX, SIGMA_MIN, Edm, Flow, continuous_process
from functa.models.latents.diffusion import Predict, diffusion_loss, draw, sample, training_process

SHAPE = (2, 2, 4)
KINDS = {"edm": {"kind": "edm", "sigma_data": 0.5}, "edm of sd 2": {"kind": "edm", "sigma_data": 2.0},
         "flow": {"kind": "flow"}}  # fmt: skip


def config(kind: str, **changes: Any) -> DiffusionConfig:
    return DiffusionConfig.model_validate(KINDS[kind] | {"conditional": False} | changes)


def sd_of(process: Edm | Flow) -> float:
    return process.sd if isinstance(process, Edm) else 1.0


def ideal(process: Edm | Flow, mean: float, sd: float) -> Predict:
    """The network that knows its data, N(mean, sd^2): what it should return is expected given x."""

    def predict(x: Tensor, t: Tensor, _: Tensor | None = None) -> Tensor:
        t = t.double()[:, None, None, None]
        if isinstance(process, Flow):
            s = t / 1000
            signal, noise, of_x0, of_noise = 1 - s, s, -torch.ones_like(s), torch.ones_like(s)
        else:
            s = process.sd / 0.5 * (4 * t).exp()
            length = (s**2 + process.sd**2).sqrt()
            signal, noise = 1 / length, s / length
            of_x0, of_noise = s / (process.sd * length), -process.sd / length
        share = (of_x0 * signal * sd**2 + of_noise * noise) / ((signal * sd) ** 2 + noise**2)  # covariance / variance
        return (of_x0 * mean + share * (x.double() - signal * mean)).float()

    return predict


def test_levels_and_preconditioning_are_those_of_edm() -> None:
    peer = EDMEulerScheduler(sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX, sigma_data=0.5, rho=7.0)
    peer.set_timesteps(18)
    process = Edm(0.5)
    torch.testing.assert_close(torch.tensor([*process.levels(18), 0.0]), peer.sigmas.float(), rtol=1e-5, atol=0)
    x0, noise = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE)
    for level in (0.01, 0.5, 20.0):
        s = torch.tensor(level)
        task = process.task(x0, noise, s.expand(3))
        torch.testing.assert_close(task.x, peer.precondition_inputs(x0 + s * noise, s))
        torch.testing.assert_close(task.t, peer.precondition_noise(s).expand(3))
        back = peer.precondition_outputs(x0 + s * noise, task.target, s)
        torch.testing.assert_close(back, x0, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_x0_of_a_network_that_returns_its_target_is_the_latent(kind: str) -> None:
    process = continuous_process(config(kind))
    x0, noise = sd_of(process) * torch.randn(4, *SHAPE), torch.randn(4, *SHAPE)
    for level in (process.levels(18)[0], process.levels(18)[9], process.levels(18)[-1]):
        task = process.task(x0, noise, torch.full((4,), level))
        seen: list[tuple[Tensor, Tensor]] = []

        def exact(x: Tensor, t: Tensor, task: Any = task, seen: Any = seen) -> Tensor:
            seen.append((x, t))
            return task.target

        x = (1 - level) * x0 + level * noise if kind == "flow" else x0 + level * noise
        found = process.expected(exact, x, level)
        torch.testing.assert_close(found, x0, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(seen[0], (task.x, task.t), rtol=1e-5, atol=1e-5)


def test_edm_keeps_inputs_and_targets_at_variance_1() -> None:
    process, draws = Edm(2.0), torch.Generator().manual_seed(0)
    x0, noise = 2.0 * torch.randn(50_000, 1, 1, 2), torch.randn(50_000, 1, 1, 2)
    for level in (0.05, 2.0, 100.0):
        task = process.task(x0, noise, torch.full((50_000,), level))
        assert task.x.std().item() == pytest.approx(1, abs=0.02)
        assert task.target.std().item() == pytest.approx(1, abs=0.02)
        assert abs((task.x * task.target).mean().item()) < 0.02
    logs = (process.draw_levels(50_000, draws) / process.scale).log()
    assert logs.mean().item() == pytest.approx(-1.2, abs=0.03)
    assert logs.std().item() == pytest.approx(1.2, abs=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_gaussian_data_is_reached_sample_by_sample(kind: str) -> None:
    """dx/ds is linear there: the sample is an affine function of its initial noise, and Heun's error is of 2nd order.

    EDM's 18 steps leave 6 % of the standard deviation.
    """
    process = continuous_process(config(kind))
    mean, sd = 0.25 * sd_of(process), 0.8 * sd_of(process)
    noise = gaussian_noise(torch.arange(50), 0, SHAPE)
    expected = mean + sd * noise  # the flow's; EDM begins at a finite level
    if isinstance(process, Edm):
        level = process.levels(18)[0]
        expected = mean + (level * noise - mean) * sd / math.hypot(sd, level)

    def errors(steps: int) -> float:
        z = sample(ideal(process, mean, sd), config(kind, sampling_steps=steps), SHAPE, None, range(50), None, "cpu")
        assert z.dtype == torch.float32
        return (z - expected).square().mean().sqrt().item() / sd

    coarse, fine = errors(18), errors(72)
    assert fine < 0.004
    assert 12 < coarse / fine < 24  # 16 in the limit
    assert coarse < 0.07


@pytest.mark.parametrize("kind", KINDS)
def test_the_ideal_network_has_the_least_loss_that_there_is(kind: str) -> None:
    """The flow has pi sd / 2; EDM has the posterior's variance over c_out^2, averaged over the levels."""
    chosen = config(kind)
    process = continuous_process(chosen)
    sd, draws = 0.6 * sd_of(process), torch.Generator().manual_seed(1)
    if isinstance(process, Flow):
        least = math.pi * sd / 2
    else:
        z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
        s = process.scale * (-1.2 + 1.2 * z).exp()
        posterior = s**2 * sd**2 / (s**2 + sd**2)
        weight = (s**2 + process.sd**2) / (s * process.sd) ** 2
        least = torch.trapezoid(posterior * weight * (-z.square() / 2).exp() / math.sqrt(2 * math.pi), z).item()
    x0 = sd * torch.randn(40_000, 1, 1, 3, generator=draws)
    drawn = draw(chosen, x0.shape, draws)
    loss = diffusion_loss(ideal(process, 0, sd), training_process(chosen, "cpu"), x0, None, drawn, None).item()
    assert loss == pytest.approx(least, rel=0.02)
    worse = diffusion_loss(ideal(process, 0, 0.8 * sd), training_process(chosen, "cpu"), x0, None, drawn, None).item()
    assert worse > loss


def test_heun_is_that_of_diffusers() -> None:
    steps, peer = 6, FlowMatchHeunDiscreteScheduler(num_train_timesteps=1000)
    predict = ideal(Flow(), 0.3, 0.5)
    ours = sample(predict, config("flow", sampling_steps=steps), SHAPE, None, [3, 4], None, "cpu")
    x = gaussian_noise(torch.tensor([3, 4]), 0, SHAPE)
    peer.set_timesteps(steps)
    sigmas = torch.tensor([*Flow().levels(steps), 0.0])
    peer.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    peer.timesteps = 1000 * peer.sigmas[:-1]
    for t in peer.timesteps:
        x = peer.step(predict(x, t.expand(2)), t, x).prev_sample
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sd", [0.5, 3.0])
def test_the_scale_of_the_latents_changes_nothing_but_the_scale_of_the_samples(sd: float) -> None:
    def network(x: Tensor, t: Tensor, _: Tensor | None) -> Tensor:
        return torch.tanh(x) * t[:, None, None, None]

    one, other = (
        sample(network, DiffusionConfig(kind="edm", sigma_data=scale), SHAPE, None, [1, 2], None, "cpu")
        for scale in (1.0, sd)
    )
    torch.testing.assert_close(other, sd * one, rtol=1e-3, atol=1e-3)
