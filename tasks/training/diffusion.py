"""Training of a diffusion model on latents (App. C)."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.config import Config, DenoiserConfig
from models.denoiser import build_denoiser
from models.diffusion import diffusion_loss
from models.normalize import Normalizer
from storage.functaset import Functaset
from storage.locations import open_location
from tasks.config import TrainDiffusionConfig
from tasks.training.latents import load_training, training_normalizer
from tasks.training.loop import train
from tasks.training.ranks import join_ranks
from tasks.training.run import Emit, Run
from tasks.training.saving import best_weights, finished_checkpoint
from tasks.training.seeds import batch_rows, mix, stage_number


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

    Over several devices the order of the rows stays that of one; timesteps, noise, dropped labels and dropout of a
    part of the batch derive from (seed, step, rank).
    """
    ranks = join_ranks(job.device)
    device = ranks.device
    functaset = Functaset.open(job.functaset, job.version)
    normalizer = training_normalizer(functaset, job.diffusion.normalization, plain=True)
    training = load_training(functaset, normalizer, device, plain=True)
    torch.manual_seed(mix(job.seed, stage_number("diffusion")))
    classes = job.classes if job.diffusion.process.conditional else None
    model = build_denoiser(job.diffusion.model, functaset.latent_shape, classes).to(device)
    stream = mix(job.seed, stage_number("diffusion"))

    batch = job.diffusion.batch
    part, share = ranks.part(batch), ranks.share(batch)

    def gradients(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = torch.from_numpy(batch_rows(len(training), batch, stream, step)[part]).to(device)
        given = training.labels[rows] if classes else None
        if not ranks.first:
            generator = torch.Generator().manual_seed(mix(generator.initial_seed(), ranks.rank))
        x0 = training(rows)
        loss = share * diffusion_loss(model.train(), job.diffusion.process, x0, given, generator, classes)
        loss.backward()
        return {"loss": loss}

    metadata = train(
        Run(
            stage="diffusion",
            config=job.diffusion,
            seed=job.seed,
            module=model,
            gradients=gradients,
            optimizer=torch.optim.Adam(model.parameters(), lr=job.diffusion.learning_rate),
            output=open_location(job.output),
            metadata=_metadata(job, functaset, normalizer, classes),
            emit=emit,
            ranks=ranks,
        )
    )
    told = {"weights_digest": metadata["weights_digest"], "seconds": metadata["seconds"], "commit": functaset.version}
    return told if ranks.first else {}


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


def load_denoiser(uri: str) -> tuple[nn.Module, Normalizer, dict[str, Any]]:
    """A trained denoiser (averaged weights where there are), its normaliser, and its checkpoint's metadata."""
    checkpoint = finished_checkpoint(uri, "diffusion model", "train-diffusion")
    meta = dict(checkpoint.metadata)
    model = build_denoiser(DenoiserConfig.model_validate(meta["model"]), tuple(meta["latent_shape"]), meta["classes"])
    model.load_state_dict(best_weights(checkpoint.tensors))
    return model.requires_grad_(False).eval(), Normalizer.from_state(meta["normalizer"]), meta
