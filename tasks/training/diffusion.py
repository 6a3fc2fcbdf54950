"""Training of a diffusion model on latents (App. C)."""

import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor

from functa.models.compute.graph import graphed
from functa.models.compute.parallel import fit_threads
from functa.models.compute.randomness import mix, stage_number
from functa.models.latents.denoiser import build_denoiser
from functa.models.latents.diffusion import Draw, diffusion_loss, draw, loss_tables
from functa.models.latents.normalize import Normalizer
from functa.storage.functaset.functaset import Functaset
from functa.storage.places.address import open_location
from functa.tasks.config import TrainDiffusionConfig
from functa.tasks.inputs.batches import Batches, training_batches
from functa.tasks.inputs.latents import training_normalizer
from functa.tasks.training.loop import train
from functa.tasks.training.ranks import Ranks, join_ranks
from functa.tasks.training.run import Emit, Learner, Run
from functa.tasks.training.step import accumulated, compilation, parts, step_work
from functa.tasks.training_jobs import DiffusionJob

logger = logging.getLogger(__name__)

WIDE = 20_000_000  # parameters of a UNet from which compiling for a CPU lost time (docs/results.md)


def run(job: DiffusionJob, emit: Emit) -> dict[str, Any]:
    """Trains the denoiser on the normalised latents of the training images as they are; returns its figures.

    Over several devices rows, timesteps, noise and dropped labels stay those of one; dropout's masks do not.
    """
    ranks = join_ranks(job.device)
    config = job.diffusion
    functaset = Functaset.open(job.functaset, job.version)
    normalizer = training_normalizer(functaset, config.normalization, plain=True)
    classes = job.classes if config.process.conditional else None
    seed = mix(job.seed, stage_number("diffusion"))
    batches = training_batches(
        functaset, normalizer, config.batch, seed, part=ranks.part(config.batch), steps=config.steps,
        device=ranks.device, classes=classes, plain=True,
    )  # fmt: skip
    learner = diffusion_learner(config, functaset.latent_shape, classes, batches, ranks, seed)
    logger.info("diffusion: %s", learner.mode)
    fit_threads(learner.work.flops, ranks.device)
    metadata = train(
        Run(
            stage="diffusion",
            config=config,
            seed=job.seed,
            module=learner.model,
            gradients=learner.gradients,
            optimizer=learner.optimizer,
            output=open_location(job.output),
            metadata=_metadata(job, functaset, normalizer, classes),
            emit=emit,
            ranks=ranks,
            work=learner.work,
        )
    )
    if not ranks.first:
        return {}
    return {
        "weights_digest": metadata["weights_digest"], "seconds": metadata["seconds"], "commit": functaset.version,
    }  # fmt: skip


def diffusion_learner(
    config: TrainDiffusionConfig,
    latent_shape: tuple[int, int, int],
    classes: int | None,
    batches: Batches,
    ranks: Ranks,
    seed: int,
) -> Learner:
    """The denoiser of the config as `seed` starts it, and its step on these batches."""
    device, part = ranks.device, ranks.part(config.batch)
    shape, process, tables = (config.batch, *latent_shape), config.process, loss_tables(config.process, device)
    build = partial(build_denoiser, config.model, latent_shape, classes)
    number = torch.zeros(config.batch, dtype=torch.int64)
    work = step_work(build, [torch.empty(shape), number, None if classes is None else number], config, ranks)
    torch.manual_seed(seed)
    model = build().to(device)

    def loss(x0: Tensor, labels: Tensor, t: Tensor, noise: Tensor, dropped: Tensor) -> Tensor:
        given = labels if classes is not None else None
        return diffusion_loss(model, tables, x0, given, Draw(t, noise, dropped), classes)

    some = parts(part.stop - part.start, config.micro_batch)
    total = work.flops * config.steps
    tokens = max(config.model.attention, default=0) ** 2  # of the finest level that attends
    how, wide = compilation(config, some), sum(p.numel() for p in model.parameters()) > WIDE
    in_vain = how == "auto" and wide and device.type == "cpu" and config.model.kind == "unet"
    how = "off" if in_vain else how
    loss_of, mode = graphed(loss, config.precision, how, total, device, "diffusion.compile", tokens)
    if in_vain:
        mode = "eager: its convolutions are nearly all of a step, and compiling does not touch them"

    def gradients(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        drawn = draw(process, shape, generator)  # for the whole batch: an example's, whoever computes it
        inputs = [*batches(step), *(tensor[part] for tensor in drawn)]
        return {"loss": accumulated(loss_of, some, config.batch, inputs)}

    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True)
    return Learner(model, optimizer, gradients, work, mode)


def _metadata(job: DiffusionJob, functaset: Functaset, normalizer: Normalizer, classes: int | None) -> dict[str, Any]:
    return {
        "digest": job.digest,
        "model": job.diffusion.model.model_dump(mode="json"),
        "process": job.diffusion.process.model_dump(mode="json"),
        "latent_shape": list(functaset.latent_shape),
        "classes": classes,
        "normalizer": normalizer.state(),
        "functaset": {"fingerprint": functaset.fingerprint, "version": functaset.version},
    }
