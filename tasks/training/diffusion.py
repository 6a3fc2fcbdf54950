"""Train a diffusion model on latents (App. C)."""

from typing import Any

import torch
from torch import Tensor

from functa.models.compute.randomness import mix, stage_number
from functa.models.latents.cost import denoiser_cost
from functa.models.latents.denoiser import build_denoiser
from functa.models.latents.diffusion import Draw, diffusion_loss, draw, training_process
from functa.storage.functaset.functaset import Functaset
from functa.tasks.config import TrainDiffusionConfig
from functa.tasks.inputs.batches import Batches, order_record, training_batches
from functa.tasks.inputs.latents import training_normalizer
from functa.tasks.training.checkpoints import begun
from functa.tasks.training.learner import Emit, Learner, latent_metadata, run_of
from functa.tasks.training.loop import train
from functa.tasks.training.ranks import Ranks, join_ranks
from functa.tasks.training.step import batch_loss, overlaps, step_work
from functa.tasks.training_jobs import DiffusionJob

WIDE = 20_000_000  # parameters of a UNet above which compiling for a CPU lost time (docs/results.md)


def run(job: DiffusionJob, emit: Emit) -> dict[str, Any]:
    """Train the denoiser on the normalised latents of the training images, without augmentations; return its figures.

    With several devices rows, timesteps, noise and dropped labels are those of one device; dropout's masks are not.
    """
    ranks = join_ranks(job)
    config = job.diffusion
    functaset = Functaset.open(job.functaset, job.version)
    normalizer = training_normalizer(functaset, config.normalization, plain=True)
    classes = job.classes if config.process.conditional else None
    seed = mix(job.seed, stage_number("diffusion"))
    batches = training_batches(
        functaset, normalizer, config.batch, seed, ranks=ranks, steps=config.steps, classes=classes, plain=True,
        begun=begun(job), hydrates=job.hydrate,
    )  # fmt: skip
    learner = diffusion_learner(config, functaset.latent_shape, classes, batches, ranks, seed)
    metadata = latent_metadata(functaset, normalizer) | order_record(batches, ranks) | {
        "model": config.model.model_dump(mode="json"), "process": config.process.model_dump(mode="json"),
        "classes": classes,
        "class_names": list(job.class_names),
    }  # fmt: skip
    figures = train(run_of(job, learner, ranks, emit, metadata))
    return figures | {"commit": functaset.version}


def diffusion_learner(
    config: TrainDiffusionConfig,
    latent_shape: tuple[int, int, int],
    classes: int | None,
    batches: Batches,
    ranks: Ranks,
    seed: int,
) -> Learner:
    """Build the denoiser of the config, initialised from `seed`, and its step on these batches."""
    device, part = ranks.device, ranks.part(config.batch)
    shape, process, tables = (config.batch, *latent_shape), config.process, training_process(config.process, device)
    cost = denoiser_cost(config.model, latent_shape, classes)
    work = step_work(cost, config, ranks)
    torch.manual_seed(seed)
    model = build_denoiser(config.model, latent_shape, classes).to(device)

    def loss(x0: Tensor, labels: Tensor, t: Tensor, noise: Tensor, dropped: Tensor) -> Tensor:
        given = labels if classes is not None else None
        return diffusion_loss(model, tables, x0, given, Draw(t, noise, dropped), classes)

    tokens = max(config.model.attention, default=0) ** 2  # of the finest level with attention
    wide = config.model.kind == "unet" and cost.parameters > WIDE
    eager = ""
    if config.compile == "auto" and wide and device.type == "cpu":
        eager = "its convolutions are nearly all of a step, and compiling does not change them"
    batch_gradients, mode = batch_loss(loss, config, ranks, work, "diffusion.compile", tokens, model, eager)

    def gradients(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        drawn = draw(process, shape, generator)  # for the whole batch: an example's draw does not depend on the rank
        return {"loss": batch_gradients([*batches(step), *(tensor[part] for tensor in drawn)])}

    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True)
    return Learner(model, optimizer, gradients, work, mode, overlaps(ranks, mode))
