"""Training of a diffusion model on latents (App. C)."""

import logging
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.config import Config, DenoiserConfig
from models.denoiser import build_denoiser
from models.diffusion import Draw, diffusion_loss, draw, loss_tables
from models.normalize import Normalizer
from storage.functaset import Functaset
from storage.locations import open_location
from tasks.config import TrainDiffusionConfig
from tasks.training.batches import Batches, training_batches
from tasks.training.graph import accumulated, compilation, graphed, parts
from tasks.training.latents import training_normalizer
from tasks.training.loop import train
from tasks.training.ranks import Ranks, join_ranks
from tasks.training.run import Emit, Learner, Run
from tasks.training.saving import trained_description, trained_weights
from tasks.training.seeds import mix, stage_number
from tasks.training.threads import fit_threads
from tasks.training.work import step_work

logger = logging.getLogger(__name__)
WIDE = 20_000_000  # parameters of a UNet from which compiling for a CPU lost time (docs/results.md)


class DiffusionJob(Config):
    """One diffusion run, as the child process receives it."""

    kind: Literal["diffusion"] = "diffusion"
    seed: int
    diffusion: TrainDiffusionConfig
    functaset: str
    version: int | None = None  # the commit; None: the newest
    classes: int
    device: str
    devices: int = 1
    output: str
    digest: str


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


def describe_denoiser(uri: str) -> dict[str, Any]:
    """What was recorded of a trained denoiser: process, latent shape, classes, functaset, config."""
    return trained_description(uri, "diffusion model", "train-diffusion")


def load_denoiser(uri: str) -> tuple[nn.Module, Normalizer, dict[str, Any]]:
    """A trained denoiser (averaged weights where there are), its normaliser, and what else was recorded of it."""
    weights, meta = trained_weights(uri, "diffusion model", "train-diffusion")
    model = build_denoiser(DenoiserConfig.model_validate(meta["model"]), tuple(meta["latent_shape"]), meta["classes"])
    model.load_state_dict(weights)
    return model.requires_grad_(False).eval(), Normalizer.from_state(meta["normalizer"]), meta
