"""Train a small classifier on pixels, whose penultimate features are a space for Frechet distances."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from functa.models.compute.batch_order import batch_rows
from functa.models.compute.parallel import fit_threads
from functa.models.compute.randomness import mix, stage_number
from functa.models.latents.classifier import build_pixel_classifier, classification_loss, decay_groups
from functa.models.latents.cost import pixel_classifier_cost
from functa.storage.images.source import open_images
from functa.tasks.inputs.pictures import Pictures, as_float
from functa.tasks.trained import logits_of
from functa.tasks.training.learner import Emit, Learner, run_of
from functa.tasks.training.loop import train
from functa.tasks.training.ranks import join_ranks
from functa.tasks.training_jobs import PixelClassifierJob

TEST_IMAGES = 2000  # enough to see whether a feature space works


def run(job: PixelClassifierJob, emit: Emit) -> dict[str, Any]:
    """Train the pixel classifier; return its test accuracy."""
    ranks = join_ranks(job)
    device = ranks.device
    images = open_images(job.images)
    training = Pictures(images, "train", job.images)
    test = Pictures(images, "test", job.images, limit=TEST_IMAGES)
    config, shape = job.pixel_classifier, (training.channels, training.resolution[0], len(images.classes))
    torch.manual_seed(mix(job.seed, stage_number("pixels")))
    model = build_pixel_classifier(config.width, config.features, *shape).to(device)
    stream = mix(job.seed, stage_number("pixels"))

    fit_threads(3.0 * pixel_classifier_cost(config.width, config.features, *shape).flops * config.batch, device)
    part, share = ranks.part(config.batch), ranks.share(config.batch)

    def gradients(step: int, _: torch.Generator) -> dict[str, Tensor]:
        pixels, rows = training.read(batch_rows(len(training), config.batch, stream, step), part)
        labels = torch.from_numpy(training.labels[rows].astype(np.int64)).to(device)
        loss = share * classification_loss(model.train()(as_float(pixels, device)), labels, 0.0)
        loss.backward()
        return {"loss": loss}

    def accuracy(judged: nn.Module) -> dict[str, float]:
        logits = logits_of(judged, test.batch(np.arange(len(test))).to(device), 256)
        return {"accuracy": float((logits.argmax(1).cpu().numpy() == test.labels).mean())}

    decayed = decay_groups(model, config.weight_decay)
    optimizer = torch.optim.AdamW(decayed, lr=config.learning_rate, fused=True)
    run = run_of(
        job, Learner(model, optimizer, gradients), ranks, emit, {"model": [config.width, config.features, *shape]},
        evaluate=accuracy, examples=(len(training), training.digest),
    )  # fmt: skip
    figures = train(run)
    return figures | {"top1_pixels": run.rows[-1]["accuracy"]} if ranks.first else {}
