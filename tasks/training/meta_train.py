"""Meta-train the field: the outer loop (paper section 4)."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from functa.models.compute.batch_order import batch_rows
from functa.models.compute.compilation import announced, should_compile
from functa.models.compute.parallel import fit_threads
from functa.models.compute.randomness import mix, stage_number
from functa.models.field.cost import outer_flops
from functa.models.field.field import Field
from functa.models.field.inner import InnerLoop
from functa.models.measures.metrics import psnr_of_errors
from functa.storage.images.source import Images, open_images
from functa.storage.places.address import open_location
from functa.storage.runs.checkpoints import trained_metadata
from functa.tasks.config import MetaTrainConfig
from functa.tasks.inputs.pictures import Pictures, as_float
from functa.tasks.inputs.prefetch import Prefetcher
from functa.tasks.trained import refuse_other_field
from functa.tasks.training.learner import Emit, Gradients, Learner, run_of
from functa.tasks.training.loop import train
from functa.tasks.training.optimizer import outer_optimizer
from functa.tasks.training.ranks import Ranks, join_ranks
from functa.tasks.training_jobs import MetaTrainJob

FALLEN = 3.0  # dB below the best PSNR so far; the noise of 64 validation images is a tenth of that


def run(job: MetaTrainJob, emit: Emit) -> dict[str, Any]:
    """Train the field to the end of its schedule; return its figures.

    Raises StorageError if the output holds another field whose training has finished.
    """
    stored = trained_metadata(open_location(job.output))
    if stored is not None and stored.get("finished"):  # an unfinished one is replaced
        refuse_other_field(job.output, stored, job.field)
    ranks = join_ranks(job)
    images = open_images(job.images)
    training = Pictures(images, "train", job.images)
    loop, why = _loop(job, training, ranks.device)
    emit({"note": announced(why)})
    gradients = _outer_step(job, loop, training, ranks)
    learner = Learner(loop.field, outer_optimizer(loop.field, job.meta_train), gradients)
    run = run_of(
        job, learner, ranks, emit, _metadata(job, training),
        evaluate=_validation(job, images, loop, ranks, emit) if ranks.first else None,
        evaluate_every=job.meta_train.validate_every, examples=(len(training), training.digest),
    )  # fmt: skip
    return train(run)


def _loop(job: MetaTrainJob, training: Pictures, device: torch.device) -> tuple[InnerLoop, str]:
    seed = mix(job.seed, stage_number("field")) % 2**31
    field = Field(job.field, job.inner, training.channels, seed, training.resolution).to(device)
    some = job.meta_train.patches_per_image
    flops = outer_flops(job.field, job.inner, training.resolution, training.channels, some)
    work = flops * job.meta_train.batch * job.meta_train.steps
    compiled, why = should_compile(job.inner.compile, work, device)
    fit_threads(flops * job.meta_train.batch, device)
    return InnerLoop(field, job.inner, training.resolution, compiled), why


def _outer_step(job: MetaTrainJob, loop: InnerLoop, training: Pictures, ranks: Ranks) -> Gradients:
    """Return the gradients of an outer step: of this rank's part of the batch, a few images per backward pass.

    `psnr_train` needs no inner loop of its own: it is computed from the errors of the outer loss, which are those of
    the drawn patches if patches are drawn.
    """
    config, device = job.meta_train, ranks.device
    part, size = ranks.part(config.batch), _images_at_once(config, ranks)
    stream = mix(job.seed, stage_number("meta_train"))

    def inputs(step: int) -> list[Tensor]:
        made = [torch.from_numpy(training.read(batch_rows(len(training), config.batch, stream, step), part)[0])]
        if config.patches_per_image:
            seed = mix(stream, stage_number("patches"), step)
            made.append(random_positions(config.batch, job.field.positions, config.patches_per_image, seed)[part])
        return [tensor.pin_memory() for tensor in made] if device.type == "cuda" else made

    prefetcher = Prefetcher(inputs, config.steps, threaded=device.type == "cuda" or not training.in_memory)

    def gradients(step: int, _: torch.Generator) -> dict[str, Tensor]:
        pixels, *positions = (tensor.to(device, non_blocking=True) for tensor in prefetcher(step))
        images = as_float(pixels, device)
        errors = []
        for start in range(0, len(images), size):
            rows = slice(start, start + size)
            some = positions[0][rows] if positions else None
            errors.append(loop.outer_backward(images[rows], some, share=len(images[rows]) / config.batch))
        error = torch.cat(errors)  # [B of this rank]
        return {"loss": error.sum() / config.batch, "psnr_train": psnr_of_errors(error).sum() / config.batch}

    return gradients


def _images_at_once(config: MetaTrainConfig, ranks: Ranks) -> int:
    part = ranks.part(config.batch)
    return min(config.micro_batch or config.batch, part.stop - part.start)


def random_positions(batch: int, positions: int, count: int, seed: int) -> Tensor:
    """Draw the patches of every image that a step trains on, each at most once: int64 [batch, count].

    Drawn for the whole global batch, so that an image's patches do not depend on its rank.
    Raises ValueError if an image has fewer.
    """
    if count > positions:
        raise ValueError(f"meta_train.patches_per_image={count}, but an image has {positions} patches: lower it")
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, positions, generator=generator).topk(count, sorted=False).indices


def _metadata(job: MetaTrainJob, training: Pictures) -> dict[str, Any]:
    return {
        "field": job.field.model_dump(mode="json", exclude=job.field.unused),
        "inner": job.inner.model_dump(mode="json", exclude=job.inner.unused),
        "image_channels": training.channels,
        "resolution": training.resolution[0],
        "images": len(training),
    }


def _validation(
    job: MetaTrainJob, images: Images, loop: InnerLoop, ranks: Ranks, emit: Emit
) -> Callable[[nn.Module], dict[str, float]] | None:
    if not job.meta_train.validation_images:
        return None
    held_out = Pictures(images, "test", job.images, limit=job.meta_train.validation_images)
    count = len(held_out)
    if not count:
        return None
    # Parts of one size, the last one padded: a compiled graph has one shape. Training uses the same size, so it fits.
    size = min(_images_at_once(job.meta_train, ranks), count)
    pixels = held_out.batch(np.arange(-(-count // size) * size) % count)

    best = -math.inf

    def evaluate(judged: nn.Module) -> dict[str, float]:
        nonlocal best
        assert isinstance(judged, Field)
        judge = InnerLoop(judged, job.inner, loop.resolution, loop.compiled)
        errors = torch.cat([judge.errors(part.to(ranks.device)) for part in pixels.split(size)])[:count]
        psnr = psnr_of_errors(errors).mean().item()
        if psnr < best - FALLEN:
            emit({"note": divergence_note(best, psnr, job.meta_train.learning_rate)})
        best = max(best, psnr)
        return {"psnr": psnr}

    return evaluate


def divergence_note(best: float, psnr: float, learning_rate: float) -> str:
    """Return the message for a diverging training, which continues since its loss stays finite."""
    return (
        f"PSNR of the test images fell from {best:.1f} to {psnr:.1f} dB: the training diverges; interrupt it and "
        f"start again with a meta_train.learning_rate below {learning_rate:g} or a smaller meta_train.clip_norm"
    )
