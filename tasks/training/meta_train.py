"""Meta-training of the field: the outer loop (paper section 4)."""

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from models.compilation import should_compile
from models.config import Config, FieldConfig, InnerConfig
from models.field import Field, forward_flops
from models.inner import InnerLoop
from models.metrics import psnr_of_errors
from storage.config import ImagesConfig
from storage.images import open_images
from storage.locations import open_location
from tasks.config import MetaTrainConfig
from tasks.training.device import choose_device
from tasks.training.loop import Emit, Run, batch_rows, best_weights, finished_checkpoint, mix, stage_number, train
from tasks.training.pictures import Pictures

OUTER_PASSES = 15  # forward-pass equivalents of one outer step with three inner steps and the first one shared


class MetaTrainJob(Config):
    """One meta-training run, as the child process receives it."""

    kind: Literal["meta_train"] = "meta_train"
    seed: int
    images: ImagesConfig
    field: FieldConfig
    inner: InnerConfig
    meta_train: MetaTrainConfig
    device: str
    output: str
    digest: str


def run(job: MetaTrainJob, emit: Emit) -> dict[str, Any]:
    """Trains the field to the end of its schedule; returns its figures."""
    device = choose_device(job.device)
    images = open_images(job.images)
    training = Pictures(images, "train", job.images)
    loop = _loop(job, training, device)
    emit({"note": loop[1]})
    field, inner_loop = loop[0].field, loop[0]
    stream = mix(job.seed, stage_number("meta_train"))

    def gradients(step: int, _: torch.Generator) -> Tensor:
        batch = training.batch(batch_rows(len(training), job.meta_train.batch, stream, step))
        return inner_loop.outer_backward(batch.to(device, non_blocking=True)).mean()

    metadata = train(
        Run(
            stage="meta_train",
            config=job.meta_train,
            seed=job.seed,
            module=field,
            gradients=gradients,
            optimizer=torch.optim.Adam(field.parameters(), lr=job.meta_train.learning_rate),
            output=open_location(job.output),
            metadata=_metadata(job, training),
            emit=emit,
            evaluate=_validation(job, images, inner_loop, device),
            evaluate_every=job.meta_train.validate_every,
        )
    )
    return {"weights_digest": metadata["weights_digest"], "seconds": metadata["seconds"]}


def _loop(job: MetaTrainJob, training: Pictures, device: torch.device) -> tuple[InnerLoop, str]:
    seed = mix(job.seed, stage_number("field")) % 2**31
    field = Field(job.field, job.inner, training.channels, seed).to(device)
    flops = OUTER_PASSES * forward_flops(job.field, training.resolution, training.channels)
    work = float(flops) * job.meta_train.batch * job.meta_train.steps
    compiled, why = should_compile(job.inner.compile, work, device)
    return InnerLoop(field, job.inner, training.resolution, compiled), why


def _metadata(job: MetaTrainJob, training: Pictures) -> dict[str, Any]:
    return {
        "digest": job.digest,
        "field": job.field.model_dump(mode="json"),
        "inner": job.inner.model_dump(mode="json"),
        "image_channels": training.channels,
        "resolution": training.resolution[0],
        "images": len(training),
    }


def _validation(job: MetaTrainJob, images: Any, loop: InnerLoop, device: torch.device) -> Any:
    if not job.meta_train.validation_images:
        return None
    held_out = Pictures(images, "test", job.images, limit=job.meta_train.validation_images)
    if not len(held_out):
        return None
    pixels = held_out.batch(np.arange(len(held_out)))

    def evaluate(judged: nn.Module) -> dict[str, float]:
        assert isinstance(judged, Field)
        judge = InnerLoop(judged, job.inner, loop.resolution)
        errors = [judge.errors(part.to(device)) for part in pixels.split(64)]
        return {"psnr": psnr_of_errors(torch.cat(errors)).mean().item()}

    return evaluate


def load_field(uri: str) -> tuple[Field, InnerConfig, dict[str, Any]]:
    """A trained field, the inner loop it was trained with, and its checkpoint's metadata.

    Raises StorageError where there is no valid checkpoint.
    """
    checkpoint = finished_checkpoint(uri, "field", "meta-train")
    inner = InnerConfig.model_validate(checkpoint.metadata["inner"])
    config = FieldConfig.model_validate(checkpoint.metadata["field"])
    field = Field(config, inner, checkpoint.metadata["image_channels"])
    field.load_state_dict(best_weights(checkpoint.tensors))
    return field.requires_grad_(False), inner, dict(checkpoint.metadata)
