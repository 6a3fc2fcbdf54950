"""Diffusion on normalised latents: DDPM's noise schedule, training loss, guidance, samplers (App. C, C.4).

The noise table is ours, in float64, and serves training and both samplers alike. The ancestral step is five numbers
per step from that table (diffusers' DDPMScheduler draws its noise itself, so a sample would depend on its batch);
DPM-Solver++ is diffusers'. EDM and rectified flow, which share loss, guidance and seeds, are in continuous.py.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from functa.models.compute.randomness import gaussian_noise
from functa.models.config import DiffusionConfig
from functa.models.latents.continuous import Edm, Flow, Predict, Progress, Task, continuous_process, heun

# (x [B, s, s, c], t [B], labels [B]) -> the noise [B, s, s, c], of edm and flow their targets. Predict is the same with
# labels and guidance bound.
Denoise = Callable[[Tensor, Tensor, Tensor | None], Tensor]

# Where DPM-Solver++ starts: log(alpha / sigma). Nearer to pure noise the cosine schedule's x0 estimate multiplies the
# network's error by up to 2e4, which no later deterministic step repairs (diffusers PR 3314).
LOG_SNR_START = -5.1


def betas(config: DiffusionConfig) -> Tensor:
    """beta_t, float64 [T]: cosine (Nichol & Dhariwal 2021, eq. 17) or linear (Ho et al. 2020), rescaled to T as ADM."""
    steps = config.timesteps
    if config.schedule == "cosine":
        angle = (torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2
        alpha_bar = angle.cos().square()  # [T + 1]
        table = 1 - alpha_bar[1:] / alpha_bar[:-1]
    else:
        table = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64) * (1000 / steps)
    return table.clamp(max=0.999)  # [T]


def alphas_cumprod(config: DiffusionConfig) -> Tensor:
    """alpha_bar_t: the share of x0's variance in x_t, float64 [T]."""
    return (1 - betas(config)).cumprod(0)


def timestep_probabilities(config: DiffusionConfig) -> Tensor:
    """Return how often each timestep is trained, float64 [T]: linear from t = 0 to T, ends in ratio r : 1 (C.4.3)."""
    weights = torch.linspace(config.timestep_ratio, 1, config.timesteps, dtype=torch.float64)
    return weights / weights.sum()


class Tables(NamedTuple):
    """The tables of the loss, on its device: sqrt(alpha_bar), sqrt(1 - alpha_bar) and losses' weights, float32 [T]."""

    signal: Tensor
    noise: Tensor
    weight: Tensor

    def task(self, x0: Tensor, noise: Tensor, t: Tensor) -> Task:
        """The network's task at timesteps int64 [B]."""
        signal_t, noise_t = (table[t][:, None, None, None] for table in (self.signal, self.noise))
        return Task(signal_t * x0 + noise_t * noise, t, noise)


def training_process(config: DiffusionConfig, device: torch.device | str) -> Tables | Edm | Flow:
    """Return what diffusion_loss needs to know of the process; tables lie on the device."""
    return loss_tables(config, device) if config.kind == "ddpm" else continuous_process(config)


def loss_tables(config: DiffusionConfig, device: torch.device | str) -> Tables:
    """Return the config's tables. Weights are 1; with `weighted` 1 / (T p(t)): the expected loss is that of r = 1."""
    alpha_bar = alphas_cumprod(config)
    weight = 1 / (config.timesteps * timestep_probabilities(config)) if config.weighted else torch.ones_like(alpha_bar)
    return Tables(*(x.float().to(device) for x in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), weight)))


class Draw(NamedTuple):
    """The random numbers of a batch's loss: timesteps int64 [B] (edm, flow: levels, float32), noise [B, s, s, c], and
    dropped labels bool [B]."""

    t: Tensor
    noise: Tensor
    dropped: Tensor


@lru_cache(maxsize=8)
def _cumulative(config: DiffusionConfig, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # or the cached tensor could never be trained with
        return timestep_probabilities(config).cumsum(0).to(device)


def sample_timesteps(config: DiffusionConfig, n: int, generator: torch.Generator) -> Tensor:
    """n timesteps int64 [n] from timestep_probabilities, by its inverse; on the generator's device."""
    uniform = torch.rand(n, dtype=torch.float64, generator=generator, device=generator.device)
    cumulative = _cumulative(config, generator.device)
    return torch.searchsorted(cumulative, uniform, right=True).clamp(max=config.timesteps - 1)


def draw(config: DiffusionConfig, shape: Sequence[int], generator: torch.Generator) -> Draw:
    """Draw them for a batch [B, s, s, c], on the generator's device: on the one that computes, the host never waits."""
    device = generator.device
    discrete = config.kind == "ddpm"
    draw_times = partial(sample_timesteps, config) if discrete else continuous_process(config).draw_levels
    t = draw_times(shape[0], generator)
    noise = torch.randn(tuple(shape), generator=generator, device=device)
    return Draw(t, noise, torch.rand(shape[0], generator=generator, device=device) < config.label_drop)


def diffusion_loss(
    denoiser: Denoise,
    process: Tables | Edm | Flow,
    x0: Tensor,
    labels: Tensor | None,
    drawn: Draw,
    classes: int | None,
) -> Tensor:
    """Mean squared error of the predicted noise (Ho et al. 2020, eq. 14), of edm and flow of their targets; a scalar.

    x0: normalised latents [B, s, s, c]. labels int64 [B], of which the drawn ones become the dummy class K (C.1);
    None for an unconditional denoiser. All tensors are on one device. Ratio sampling of timesteps is weighted back
    only if the tables have the weights for it: without them it changes the objective (C.4.3).
    """
    if labels is not None:
        if classes is None:
            raise ValueError("labels need the number of classes: the dummy label is the one after the last")
        labels = labels.masked_fill(drawn.dropped, classes)
    x_t, t, target = process.task(x0, drawn.noise, drawn.t)
    errors = (denoiser(x_t, t, labels).float() - target).square().mean((1, 2, 3))  # [B]
    return (process.weight[drawn.t] * errors).mean() if isinstance(process, Tables) else errors.mean()


def guided(denoiser: Denoise, labels: Tensor | None, guidance: float, classes: int | None) -> Predict:
    """The denoiser with labels bound: eps_u + w (eps_c - eps_u) in one batch of 2B (C.4.2: w = 0 is unconditional).

    classes None: a denoiser without labels. w = 1 and w = 0 each need one half, and labels may be None for w = 0.
    """
    if classes is None:
        return lambda x, t: denoiser(x, t, None)
    dummy = classes
    if guidance == 0:
        return lambda x, t: denoiser(x, t, torch.full_like(t, dummy, dtype=torch.int64))
    if labels is None:
        raise ValueError(f"guidance {guidance:g} needs labels: give them, or guidance 0 for unconditional samples")
    if guidance == 1:
        return lambda x, t: denoiser(x, t, labels)
    both = torch.cat([labels, torch.full_like(labels, dummy)])  # [2B]

    def predict(x: Tensor, t: Tensor) -> Tensor:
        conditional, unconditional = denoiser(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    return predict


@torch.no_grad()
def sample(
    denoiser: Denoise,
    config: DiffusionConfig,
    latent_shape: tuple[int, int, int],
    labels: Tensor | None,
    seeds: Tensor | Sequence[int],
    classes: int | None,
    device: torch.device | str,
    progress: Progress | None = None,
) -> Tensor:
    """Draws one normalised latent per seed: float32 [N, s, s, c]. labels int64 [N] where the denoiser has classes.

    All of a sample's randomness is a function of its own seed and the step, so sample i is the same in any batch (up
    to what the denoiser's own arithmetic owes to the batch) and on any device. The denoiser must be in evaluation
    mode: ValueError otherwise, since dropout would spoil samples silently.
    """
    if isinstance(denoiser, nn.Module) and denoiser.training:
        raise ValueError("sampling with a denoiser in training mode would apply its dropout: call .eval() first")
    streams = torch.as_tensor(seeds, dtype=torch.int64).to(device)  # [N]
    predict = guided(denoiser, None if labels is None else labels.to(device), config.guidance, classes)
    x = gaussian_noise(streams, 0, latent_shape)  # [N, s, s, c]
    sampler = {"ddpm": _sample_ddpm, "dpmpp": _sample_dpmpp, "heun": _sample_heun}[config.sampler]
    return sampler(predict, config, x, streams, progress or (lambda done, total: None))


@dataclass(frozen=True)
class AncestralStep:
    """x_prev = x0_weight x0 + x_weight x + deviation noise, where x0 is estimated at (t, alpha_bar)."""

    t: int
    alpha_bar: float
    x0_weight: float
    x_weight: float
    deviation: float


def ancestral_steps(config: DiffusionConfig) -> list[AncestralStep]:
    """The DDPM sampler's steps, noisiest first, over evenly spaced timesteps with both ends (ADM's respacing).

    From Ho et al. 2020, eq. 7, between neighbours of the spacing; the variance is the posterior's (fixed_small) or
    beta (fixed_large); the last step is the x0 estimate alone.
    """
    alpha_bar = alphas_cumprod(config).tolist()
    spacing = np.linspace(0, config.timesteps - 1, config.sampling_steps).round().astype(int).tolist()
    steps, previous = [], 1.0  # alpha_bar before t = 0
    for t in spacing:
        now = alpha_bar[t]
        alpha, noise = now / previous, 1 - now
        posterior = (1 - previous) / noise * (1 - alpha)
        variance = posterior if config.variance == "fixed_small" or t == 0 else 1 - alpha
        x0_weight = math.sqrt(previous) * (1 - alpha) / noise
        x_weight = math.sqrt(alpha) * (1 - previous) / noise
        steps.append(AncestralStep(t, now, x0_weight, x_weight, math.sqrt(variance)))
        previous = now
    return steps[::-1]


def dpm_solver(config: DiffusionConfig) -> Any:
    """diffusers' DPM-Solver++ 2M (Lu et al. 2022) on our table, its timesteps set; it is fed x0 estimates.

    Timesteps run evenly from where log(alpha / sigma) passes LOG_SNR_START, and the last step goes to sigma 0: with
    diffusers' default "sigma_min" rather than "zero" samples come out too wide. Duplicates from rounding are dropped.
    """
    from diffusers import DPMSolverMultistepScheduler

    solver: Any = DPMSolverMultistepScheduler(
        num_train_timesteps=config.timesteps,
        trained_betas=betas(config).tolist(),
        solver_order=2,
        algorithm_type="dpmsolver++",
        prediction_type="sample",
        final_sigmas_type="zero",
        lower_order_final=True,
    )
    alpha_bar = alphas_cumprod(config)
    levels = int(((alpha_bar / (1 - alpha_bar)).log() / 2 >= LOG_SNR_START).sum())  # log-SNR falls with t
    spacing = np.arange(config.sampling_steps, 0, -1) / config.sampling_steps * levels  # trailing: the first is levels
    solver.set_timesteps(timesteps=sorted({max(round(t) - 1, 0) for t in spacing.tolist()}, reverse=True))
    return solver


def _estimate_x0(predict: Predict, x: Tensor, t: int, alpha_bar: float, clip: float | None) -> Tensor:
    """The x0 [B, s, s, c] that the predicted noise implies at timestep t, clipped to +- clip."""
    eps = predict(x, torch.full((len(x),), t, dtype=torch.int64, device=x.device)).float()
    x0 = (x - math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha_bar)
    return x0 if clip is None else x0.clamp(-clip, clip)


def _sample_ddpm(predict: Predict, config: DiffusionConfig, x: Tensor, streams: Tensor, progress: Progress) -> Tensor:
    steps = ancestral_steps(config)
    for done, step in enumerate(steps, start=1):
        x0 = _estimate_x0(predict, x, step.t, step.alpha_bar, config.clip)
        x = step.x0_weight * x0 + step.x_weight * x
        if step.deviation:
            x = x + step.deviation * gaussian_noise(streams, done, tuple(x.shape[1:]))
        progress(done, len(steps))
    return x


def _sample_heun(predict: Predict, config: DiffusionConfig, x: Tensor, streams: Tensor, progress: Progress) -> Tensor:
    """Deterministic after the initial noise: streams are not drawn from."""
    process = continuous_process(config)

    def expected(x: Tensor, level: float) -> Tensor:
        x0 = process.expected(predict, x, level)
        return x0 if config.clip is None else x0.clamp(-config.clip, config.clip)

    return heun(expected, process.levels(config.sampling_steps), x, progress)


def _sample_dpmpp(predict: Predict, config: DiffusionConfig, x: Tensor, streams: Tensor, progress: Progress) -> Tensor:
    """Deterministic after the initial noise: streams are not drawn from."""
    solver, alpha_bar = dpm_solver(config), alphas_cumprod(config).tolist()
    timesteps = solver.timesteps.tolist()
    for done, t in enumerate(timesteps, start=1):
        x0 = _estimate_x0(predict, x, t, alpha_bar[t], config.clip)
        x = solver.step(x0, t, x, return_dict=False)[0]
        progress(done, len(timesteps))
    return x
