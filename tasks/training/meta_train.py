"""Meta-training of the field: the outer loop (paper section 4)."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from functa.models.compute.compilation import should_compile
from functa.models.compute.parallel import fit_threads
from functa.models.compute.randomness import batch_rows, mix, stage_number
from functa.models.field.cost import outer_flops
from functa.models.field.field import Field
from functa.models.field.inner import InnerLoop
from functa.models.measures.metrics import psnr_of_errors
from functa.storage.images.source import Images, open_images
from functa.storage.places.address import open_location
from functa.storage.runs.checkpoints import newest_metadata
from functa.tasks.config import MetaTrainConfig
from functa.tasks.inputs.pictures import Pictures
from functa.tasks.inputs.prefetch import Prefetcher
from functa.tasks.trained import refuse_other_field
from functa.tasks.training.loop import train
from functa.tasks.training.optimizer import outer_optimizer
from functa.tasks.training.ranks import Ranks, join_ranks
from functa.tasks.training.run import Emit, Run
from functa.tasks.training_jobs import MetaTrainJob

FALLEN = 3.0  # dB below its best on the way: the noise of 64 validation images is a tenth of that


def run(job: MetaTrainJob, emit: Emit) -> dict[str, Any]:
    """Trains the field to the end of its schedule; returns its figures.

    Raises StorageError where the output holds another field that has been trained to its end.
    """
    standing = newest_metadata(open_location(job.output))
    if standing is not None and standing.get("finished"):  # one that failed does not stand in the way
        refuse_other_field(job.output, standing, job.field)
    ranks = join_ranks(job.device)
    images = open_images(job.images)
    training = Pictures(images, "train", job.images)
    loop, why = _loop(job, training, ranks.device)
    emit({"note": why})
    metadata = train(
        Run(
            stage="meta_train",
            config=job.meta_train,
            seed=job.seed,
            module=loop.field,
            gradients=_outer_step(job, loop, training, ranks),
            optimizer=outer_optimizer(loop.field, job.meta_train),
            output=open_location(job.output),
            metadata=_metadata(job, training),
            emit=emit,
            evaluate=_validation(job, images, loop, ranks, emit) if ranks.first else None,
            evaluate_every=job.meta_train.validate_every,
            ranks=ranks,
            examples=(len(training), training.digest),
        )
    )
    return {k: metadata[k] for k in ("weights_digest", "seconds")} if ranks.first else {}


def _loop(job: MetaTrainJob, training: Pictures, device: torch.device) -> tuple[InnerLoop, str]:
    seed = mix(job.seed, stage_number("field")) % 2**31
    field = Field(job.field, job.inner, training.channels, seed, training.resolution).to(device)
    some = job.meta_train.patches_per_image
    flops = outer_flops(job.field, job.inner, training.resolution, training.channels, some)
    work = flops * job.meta_train.batch * job.meta_train.steps
    compiled, why = should_compile(job.inner.compile, work, device)
    fit_threads(flops * job.meta_train.batch, device)
    return InnerLoop(field, job.inner, training.resolution, compiled), why


def _outer_step(
    job: MetaTrainJob, loop: InnerLoop, training: Pictures, ranks: Ranks
) -> Callable[[int, torch.Generator], dict[str, Tensor]]:
    """The gradients of one outer step: this rank's part of the batch, a few images per backward pass.

    Its `psnr_train` costs no inner loop of its own: it is of the errors that the outer loss is made of, of the drawn
    patches where not all are.
    """
    config, device = job.meta_train, ranks.device
    part, size = ranks.part(config.batch), _images_at_once(config, ranks)
    stream = mix(job.seed, stage_number("meta_train"))

    def inputs(step: int) -> list[Tensor]:
        made = [training.batch(batch_rows(len(training), config.batch, stream, step), part)]
        if config.patches_per_image:
            seed = mix(stream, stage_number("patches"), step)
            made.append(random_positions(config.batch, job.field.positions, config.patches_per_image, seed)[part])
        return [tensor.pin_memory() for tensor in made] if device.type == "cuda" else made

    prefetcher = Prefetcher(inputs, config.steps, threaded=device.type == "cuda" or not training.in_memory)

    def gradients(step: int, _: torch.Generator) -> dict[str, Tensor]:
        images, *positions = (tensor.to(device, non_blocking=True) for tensor in prefetcher(step))
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
    """int64 [batch, count]: the patches of every image that a step trains on, each at most once.

    Drawn for the whole global batch whoever asks, so that it does not matter which rank has an image.
    Raises ValueError where an image has fewer.
    """
    if count > positions:
        raise ValueError(f"meta_train.patches_per_image={count}, but an image has {positions} patches: lower it")
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, positions, generator=generator).topk(count, sorted=False).indices


def _metadata(job: MetaTrainJob, training: Pictures) -> dict[str, Any]:
    return {
        "digest": job.digest,
        "field": job.field.model_dump(mode="json"),
        "inner": job.inner.model_dump(mode="json"),
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
    # Parts of one size, the last one filled up: a compiled graph serves one shape. Training has shown that it fits.
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
            emit({"note": fallen(best, psnr, job.meta_train.learning_rate)})
        best = max(best, psnr)
        return {"psnr": psnr}

    return evaluate


def fallen(best: float, psnr: float, learning_rate: float) -> str:
    """What an operator is told of a training that no longer is what it was: its loss stays finite, so it goes on."""
    return (
        f"PSNR of the test images fell from {best:.1f} to {psnr:.1f} dB: the training diverges; interrupt it, and "
        f"start again with a meta_train.learning_rate below {learning_rate:g} or a smaller meta_train.clip_norm"
    )
