"""Diffusion against its equations in float64, diffusers, and distributions whose answer is known."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from functa.models.compute.randomness import gaussian_noise
from functa.models.config import DenoiserConfig, DiffusionConfig
from functa.models.latents.denoiser import build_denoiser
from functa.models.latents.diffusion import (
    alphas_cumprod,
    ancestral_steps,
    betas,
    diffusion_loss,
    dpm_solver,
    draw,
    guided,
    loss_tables,
    sample,
    sample_timesteps,
    timestep_probabilities,
)

CPU = "cpu"
KINDS: list[tuple[Any, Any]] = [("ddpm", "ddpm"), ("ddpm", "dpmpp"), ("edm", "heun"), ("flow", "heun")]
PEER = {"cosine": {"beta_schedule": "squaredcos_cap_v2"}, "linear": {"beta_schedule": "linear"}}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("schedule", PEER)
def test_tables_agree_with_diffusers(schedule: str) -> None:
    config, peer = DiffusionConfig(schedule=schedule), DDPMScheduler(**PEER[schedule])
    torch.testing.assert_close(betas(config), peer.betas.double(), rtol=0, atol=1e-6)
    ours, theirs = alphas_cumprod(config), peer.alphas_cumprod.double()
    assert ours.dtype == torch.float64
    assert (ours.diff() < 0).all()
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)


@pytest.mark.parametrize("schedule", PEER)
def test_short_schedules_end_in_noise_too(schedule: str) -> None:
    for steps in (10, 50):
        config = DiffusionConfig(schedule=schedule, timesteps=steps, sampling_steps=2)
        assert alphas_cumprod(config)[-1] < 1e-3
        assert betas(config).max() <= 0.999


def plain_step(config: DiffusionConfig, x: Tensor, eps: Tensor, noise: Tensor, t: int, before: int) -> Tensor:
    """One ancestral step as Ho et al. 2020 write it, float64; before = -1 is the clean latent."""
    if config.schedule == "cosine":
        f = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
        table = [min(1 - f[i + 1] / f[i], 0.999) for i in range(1000)]
    else:
        table = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    bars = np.append(np.cumprod(1 - np.array(table)), 1.0)  # bars[-1] = 1
    bar, bar_before = bars[t], bars[before]
    beta = 1 - bar / bar_before
    x0 = (x - (1 - bar) ** 0.5 * eps) / bar**0.5
    if config.clip is not None:
        x0 = x0.clamp(-config.clip, config.clip)
    mean = (bar_before**0.5 * beta * x0 + (1 - beta) ** 0.5 * (1 - bar_before) * x) / (1 - bar)
    variance = beta if config.variance == "fixed_large" else beta * (1 - bar_before) / (1 - bar)
    return mean + (variance**0.5 * noise if t > 0 else 0)


@pytest.mark.parametrize("schedule", PEER)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_ancestral_steps_equal_the_equations_and_diffusers(schedule: str, variance: str, clip: float | None) -> None:
    config = DiffusionConfig(schedule=schedule, variance=variance, clip=clip)
    peer = DDPMScheduler(
        **PEER[schedule], variance_type=variance, clip_sample=clip is not None, timestep_spacing="linspace"
    )
    x, eps = torch.randn(2, 4, 4, 3, dtype=torch.float64), torch.randn(2, 4, 4, 3, dtype=torch.float64)
    noise = torch.randn(2, 4, 4, 3, generator=generator(7), dtype=torch.float64)
    steps = {step.t: step for step in ancestral_steps(config)}
    for t in (999, 998, 500, 100, 2, 1, 0):
        step = steps[t]
        x0 = (x - (1 - step.alpha_bar) ** 0.5 * eps) / step.alpha_bar**0.5
        x0 = x0 if clip is None else x0.clamp(-clip, clip)
        ours = step.x0_weight * x0 + step.x_weight * x + step.deviation * noise
        expected = plain_step(config, x, eps, noise, t, t - 1)
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())
        theirs = peer.step(eps, t, x, generator=generator(7)).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3 * theirs.abs().max().item())


def test_respaced_timesteps_keep_both_ends() -> None:
    config = DiffusionConfig(sampling_steps=250)
    steps = ancestral_steps(config)
    assert [step.t for step in steps[:3]] == [999, 995, 991]
    assert steps[-1].t == 0
    assert len(steps) == 250
    assert steps[-1].deviation == 0
    assert steps[-1].x_weight == 0
    assert [s.t for s in ancestral_steps(DiffusionConfig())] == list(range(999, -1, -1))
    solver = dpm_solver(DiffusionConfig(schedule="linear", sampling_steps=50))
    assert solver.timesteps.tolist() == [999 - 20 * i for i in range(50)]
    assert dpm_solver(DiffusionConfig(sampling_steps=50)).timesteps[0] == 995  # cosine: log(alpha/sigma) > -5.1


@pytest.mark.parametrize("schedule", PEER)
@pytest.mark.parametrize(
    ("sampler", "steps", "slack"), [("ddpm", 1000, 0.02), ("ddpm", 100, 0.05), ("dpmpp", 50, 0.02)]
)
def test_samplers_reach_the_data_distribution_with_the_ideal_denoiser(schedule, sampler, steps, slack) -> None:
    config = DiffusionConfig(schedule=schedule, sampler=sampler, sampling_steps=steps)
    bars, sd = alphas_cumprod(config).float(), 0.4

    def ideal(x: Tensor, t: Tensor, _: Tensor | None) -> Tensor:
        """E[noise | x] for data N(0.25, sd^2)."""
        bar = bars[t].reshape(-1, 1, 1, 1)
        return (x - 0.25 * bar.sqrt()) * (1 - bar).sqrt() / (bar * sd**2 + 1 - bar)

    z = sample(ideal, config, (2, 2, 4), None, range(400), None, "cpu")
    assert z.shape == (400, 2, 2, 4)
    assert z.dtype == torch.float32
    assert z.std().item() == pytest.approx(sd, rel=slack + 0.02)  # 0.02: 6400 numbers
    assert z.mean().item() == pytest.approx(0.25, abs=0.02)


def test_clip_bounds_every_estimate() -> None:
    for kind, sampler in KINDS:
        config = DiffusionConfig(kind=kind, sampler=sampler, sampling_steps=20, clip=0.5)
        z = sample(lambda x, t, _: -x, config, (2, 2, 3), None, [1, 2], None, "cpu")
        assert z.abs().max() <= 0.5


class Tiny(nn.Module):
    """A denoiser in which everything matters: latent, timestep and label."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3, 3)
        self.label = nn.Embedding(11, 3)
        self.rows: list[int] = []

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        self.rows.append(len(x))
        shift = 0 if labels is None else self.label(labels)[:, None, None]
        return torch.tanh(self.mix(x)) + t.reshape(-1, 1, 1, 1) / 1000 + shift


def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny().eval()


@torch.no_grad()
def test_guidance_1_is_conditional_0_unconditional_and_5_extrapolates_in_one_batch() -> None:
    model, x, t, labels = tiny(), torch.randn(4, 2, 2, 3), torch.full((4,), 300), torch.tensor([1, 2, 3, 4])
    conditional, unconditional = model(x, t, labels), model(x, t, torch.full((4,), 10))
    model.rows.clear()
    assert torch.equal(guided(model, labels, 1, 10)(x, t), conditional)
    assert torch.equal(guided(model, labels, 0, 10)(x, t), unconditional)
    assert torch.equal(guided(model, None, 0, 10)(x, t), unconditional)
    assert torch.equal(guided(model, None, 0, 10)(x, t.float()), unconditional)  # levels are no whole numbers
    five = guided(model, labels, 5, 10)(x, t)
    torch.testing.assert_close(five, unconditional + 5 * (conditional - unconditional))
    assert model.rows == [4, 4, 4, 4, 8]
    assert torch.equal(guided(model, None, 1, None)(x, t), model(x, t, None))
    with pytest.raises(ValueError, match="needs labels"):
        guided(model, None, 2, 10)


@pytest.mark.parametrize(("kind", "sampler"), KINDS)
def test_a_sample_depends_on_its_seed_and_label_alone(kind: Any, sampler: Any) -> None:
    model, config = tiny(), DiffusionConfig(kind=kind, sampler=sampler, sampling_steps=20, guidance=3, clip=2)
    seeds, labels = [5, 9, 123456789012, 0, 7], torch.tensor([0, 1, 2, 3, 4])
    done: list[tuple[int, int]] = []
    together = sample(model, config, (2, 2, 3), labels, seeds, 10, "cpu", lambda i, n: done.append((i, n)))
    assert done == [(i, config.calls) for i in range(1, config.calls + 1)]
    assert sum(model.rows) == 2 * 5 * config.calls  # with and without the label
    alone = sample(model, config, (2, 2, 3), labels[2:3], torch.tensor(seeds[2:3]), 10, "cpu")
    torch.testing.assert_close(alone, together[2:3], rtol=1e-4, atol=1e-5)
    back = sample(model, config, (2, 2, 3), labels.flip(0), seeds[::-1], 10, "cpu")
    torch.testing.assert_close(back.flip(0), together, rtol=1e-4, atol=1e-5)
    other = sample(model, config, (2, 2, 3), labels, [6, 10, 11, 1, 8], 10, "cpu")
    assert (other - together).abs().amax((1, 2, 3)).min() > 1e-3


def test_sampling_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="eval"):
        sample(tiny().train(), DiffusionConfig(guidance=0), (2, 2, 3), None, [1], 10, "cpu")


def test_noise_is_normal_and_independent_between_seeds_steps_and_elements() -> None:
    seeds = torch.arange(2000)
    x = gaussian_noise(seeds, 3, (4, 4, 15)).flatten(1)  # [2000, 240]
    assert torch.equal(gaussian_noise(seeds[10:11], 3, (4, 4, 15)).flatten(1), x[10:11])
    assert scipy.stats.kstest(x.flatten().numpy(), "norm").pvalue > 1e-3
    following = gaussian_noise(seeds, 4, (4, 4, 15)).flatten(1)
    half = x.shape[1] // 2
    pairs = [(x, following), (x[1:], x[:-1]), (x[:, 1:], x[:, :-1]), (x[:, :half], x[:, half:])]
    for a, b in pairs:  # values, and magnitudes, which Box-Muller pairs share
        for u, v in ((a, b), ((a**2 - 1) / 2**0.5, (b**2 - 1) / 2**0.5)):
            assert abs((u * v).mean().item()) * a.numel() ** 0.5 < 4.5
    assert gaussian_noise(seeds[:2], 0, (1, 1, 3)).shape == (2, 1, 1, 3)  # odd


def test_timesteps_follow_the_linear_ratio() -> None:
    config = DiffusionConfig(timestep_ratio=3)
    p = timestep_probabilities(config)
    assert p[0] / p[-1] == pytest.approx(3)
    assert p.sum() == pytest.approx(1)
    assert (p * torch.arange(1000)).sum().item() == pytest.approx(416, abs=0.5)
    t = sample_timesteps(config, 100_000, generator())
    observed = torch.bincount(t // 100, minlength=10).numpy()
    assert scipy.stats.chisquare(observed, p.reshape(10, 100).sum(1).numpy() * 100_000).pvalue > 1e-3
    few = DiffusionConfig(timesteps=2, sampling_steps=2)
    assert set(sample_timesteps(few, 100, generator()).tolist()) == {0, 1}


def drawn_loss(
    denoiser: Any, config: DiffusionConfig, x0: Tensor, labels: Tensor | None, draws: torch.Generator, classes: Any
) -> Tensor:
    return diffusion_loss(denoiser, loss_tables(config, CPU), x0, labels, draw(config, x0.shape, draws), classes)


def test_weights_undo_the_ratio_in_expectation() -> None:
    """Each timestep's error weighs as in uniform sampling, whatever the ratio."""

    def denoiser(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return torch.zeros_like(x) + (t.float() / 1000)[:, None, None, None]  # an error that grows with t

    x0, losses = torch.zeros(200_000, 1, 1, 1), {}
    for ratio, weighted in ((1.0, False), (5.0, False), (5.0, True)):
        config = DiffusionConfig(timestep_ratio=ratio, weighted=weighted)
        losses[ratio, weighted] = drawn_loss(denoiser, config, x0, None, generator(), None).item()
    assert losses[5.0, True] == pytest.approx(losses[1.0, False], abs=0.02)  # 1.333
    assert losses[5.0, False] < losses[1.0, False] - 0.08


def test_loss_drops_labels_at_the_stated_rate_and_leaves_the_callers_alone() -> None:
    seen: list[Tensor] = []

    def denoiser(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        seen.append(labels)
        return torch.zeros_like(x)

    labels = torch.arange(20_000) % 10
    before, config = labels.clone(), DiffusionConfig(label_drop=0.2)
    loss = drawn_loss(denoiser, config, torch.zeros(20_000, 1, 1, 2), labels, generator(), 10)
    dropped = seen[0] == 10
    assert dropped.float().mean().item() == pytest.approx(0.2, abs=0.012)  # 4 sd
    assert torch.equal(labels, before)
    assert torch.equal(seen[0][~dropped], labels[~dropped])
    assert loss.item() == pytest.approx(1, abs=0.04)  # the noise itself
    with pytest.raises(ValueError, match="number of classes"):
        drawn_loss(denoiser, config, torch.zeros(2, 1, 1, 2), labels[:2], generator(), None)


def test_loss_is_the_noise_error_at_the_drawn_timesteps() -> None:
    config, bars = DiffusionConfig(schedule="linear"), alphas_cumprod(DiffusionConfig(schedule="linear")).float()
    x0 = torch.randn(64, 2, 2, 3)

    def exact(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """Knows x0, and so the noise."""
        bar = bars[t].reshape(-1, 1, 1, 1)
        return (x - bar.sqrt() * x0) / (1 - bar).sqrt()

    assert drawn_loss(exact, config, x0, None, generator(), None) < 1e-6
    first, again, other = (drawn_loss(tiny(), config, x0, None, generator(s), None) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_sixty_steps_overfit_eight_latents() -> None:
    torch.manual_seed(0)
    config = DiffusionConfig()
    model = build_denoiser(DenoiserConfig(channels=32, head_channels=32), (4, 4, 4), 2)
    x0, labels, draws = torch.randn(8, 4, 4, 4), torch.arange(8) % 2, generator()

    def loss(draws: torch.Generator) -> Tensor:
        return drawn_loss(model, config, x0.repeat(8, 1, 1, 1), labels.repeat(8), draws, 2)

    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    start = loss(generator(99)).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss(draws).backward()
        optimizer.step()
    assert start == pytest.approx(1, abs=0.1)  # zero-initialised: predicts no noise
    assert loss(generator(99)).item() < 0.5 * start
