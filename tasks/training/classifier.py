"""Training of a classifier on latents (App. C)."""

import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from functa.models.compute.graph import graphed
from functa.models.compute.parallel import fit_threads
from functa.models.compute.randomness import mix, stage_number
from functa.models.latents.classifier import build_classifier, classification_loss, token_count
from functa.models.latents.normalize import Normalizer
from functa.storage.functaset.functaset import Functaset
from functa.storage.places.address import open_location
from functa.tasks.config import TrainClassifierConfig
from functa.tasks.inputs.batches import Batches, check_labels, training_batches
from functa.tasks.inputs.latents import Split, load_split, training_normalizer
from functa.tasks.trained import logits_of
from functa.tasks.training.loop import train
from functa.tasks.training.optimizer import classifier_optimizer
from functa.tasks.training.ranks import Ranks, join_ranks
from functa.tasks.training.run import Emit, Learner, Run
from functa.tasks.training.step import accumulated, compilation, parts, step_work
from functa.tasks.training_jobs import ClassifierJob

logger = logging.getLogger(__name__)


def run(job: ClassifierJob, emit: Emit) -> dict[str, Any]:
    """Trains the classifier; returns last and best test accuracy (the paper reports the best).

    Over several devices the order of the rows and their noise stay those of one; dropout's masks do not.
    """
    ranks = join_ranks(job.device)
    device, config = ranks.device, job.classifier
    functaset = Functaset.open(job.functaset, job.version)
    normalizer = training_normalizer(functaset, config.normalization)
    test = load_split(functaset, "test")
    check_labels(f"{job.functaset}, split 'test'", test.labels.numpy(), job.classes)
    seed = mix(job.seed, stage_number("classifier"))
    batches = training_batches(
        functaset, normalizer, config.batch, seed, part=ranks.part(config.batch), steps=config.steps, device=device,
        classes=job.classes,
    )  # fmt: skip
    learner = classifier_learner(config, functaset.latent_shape, job.classes, batches, ranks, seed)
    run = Run(
        stage="classifier",
        config=config,
        seed=job.seed,
        module=learner.model,
        gradients=learner.gradients,
        optimizer=learner.optimizer,
        output=open_location(job.output),
        metadata=_metadata(job, functaset, normalizer),
        emit=emit,
        evaluate=_test_accuracy(test, normalizer, device) if ranks.first else None,
        evaluate_every=config.evaluate_every,
        ranks=ranks,
        work=learner.work,
    )
    logger.info("classifier: %s", learner.mode)
    fit_threads(learner.work.flops, ranks.device)
    metadata = train(run)
    if not ranks.first:
        return {}
    accuracies = [row["accuracy"] for row in run.rows if "accuracy" in row]
    return {
        "weights_digest": metadata["weights_digest"],
        "seconds": metadata["seconds"],
        "commit": functaset.version,
        "top1_last": accuracies[-1],
        "top1_best": max(accuracies),
    }


def classifier_learner(
    config: TrainClassifierConfig,
    latent_shape: tuple[int, int, int],
    classes: int,
    batches: Batches,
    ranks: Ranks,
    seed: int,
) -> Learner:
    """The classifier of the config as `seed` starts it, and its step on these batches."""
    device, part = ranks.device, ranks.part(config.batch)
    shape = (config.batch, *latent_shape)
    build = partial(build_classifier, config.model, latent_shape, classes)
    work = step_work(build, [torch.empty(shape)], config, ranks)
    torch.manual_seed(seed)
    model = build().to(device)

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        return classification_loss(model(x), labels, config.label_smoothing)

    some = parts(part.stop - part.start, config.micro_batch)
    total = work.flops * config.steps
    tokens = token_count(config.model, latent_shape)
    how = compilation(config, some)
    loss_of, mode = graphed(loss, config.precision, how, total, device, "classifier.compile", tokens)

    def gradients(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        x, labels = batches(step)
        if config.noise:  # drawn for the whole batch: an example's, whoever computes it
            x = x + config.noise * torch.randn(shape, generator=generator, device=device)[part]
        return {"loss": accumulated(loss_of, some, config.batch, [x, labels])}

    return Learner(model, classifier_optimizer(model, config), gradients, work, mode)


def _metadata(job: ClassifierJob, functaset: Functaset, normalizer: Normalizer) -> dict[str, Any]:
    return {
        "digest": job.digest,
        "model": job.classifier.model.model_dump(mode="json"),
        "latent_shape": list(functaset.latent_shape),
        "classes": job.classes,
        "class_names": list(job.class_names),
        "normalizer": normalizer.state(),
        "functaset": {"fingerprint": functaset.fingerprint, "version": functaset.version},
    }


def _test_accuracy(test: Split, normalizer: Normalizer, device: torch.device) -> Any:
    z, labels = normalizer.normalize(test.z).to(device), test.labels.to(device)

    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"accuracy": (logits_of(model, z).argmax(1) == labels).float().mean().item()}

    return evaluate
