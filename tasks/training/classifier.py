"""Train a classifier on latents (App. C)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from functa.models.compute.randomness import mix, stage_number
from functa.models.latents.classifier import build_classifier, classification_loss
from functa.models.latents.cost import classifier_cost, token_count
from functa.models.latents.normalize import Normalizer
from functa.storage.functaset.functaset import Functaset
from functa.tasks.config import TrainClassifierConfig
from functa.tasks.inputs.batches import Batches, check_labels, order_record, training_batches
from functa.tasks.inputs.latents import Split, SplitParts, fits_as_floats, load_split, training_normalizer
from functa.tasks.trained import logits_of
from functa.tasks.training.checkpoints import begun
from functa.tasks.training.learner import Emit, Learner, latent_metadata, run_of
from functa.tasks.training.loop import train
from functa.tasks.training.optimizer import classifier_optimizer
from functa.tasks.training.ranks import Ranks, join_ranks
from functa.tasks.training.step import batch_loss, overlaps, step_work
from functa.tasks.training_jobs import ClassifierJob


def run(job: ClassifierJob, emit: Emit) -> dict[str, Any]:
    """Train the classifier; return last and best test accuracy (the paper reports the best).

    With several devices the order of rows and their noise are those of one device; dropout's masks are not.
    """
    ranks = join_ranks(job)
    config = job.classifier
    functaset = Functaset.open(job.functaset, job.version)
    normalizer = training_normalizer(functaset, config.normalization)
    seed = mix(job.seed, stage_number("classifier"))
    batches = training_batches(
        functaset, normalizer, config.batch, seed, ranks=ranks, steps=config.steps, classes=job.classes,
        begun=begun(job), hydrates=job.hydrate,
    )  # fmt: skip
    learner = classifier_learner(config, functaset.latent_shape, job.classes, batches, ranks, seed)
    metadata = latent_metadata(functaset, normalizer) | order_record(batches, ranks) | {
        "model": config.model.model_dump(mode="json"), "classes": job.classes, "class_names": list(job.class_names),
    }  # fmt: skip
    # The others need not hold the test rows.
    evaluate = _test_accuracy(job, functaset, normalizer, ranks.device) if ranks.first else None
    run = run_of(job, learner, ranks, emit, metadata, evaluate=evaluate, evaluate_every=config.evaluate_every)
    figures = train(run)
    if not ranks.first:
        return {}
    accuracies = [row["accuracy"] for row in run.rows if "accuracy" in row]
    return figures | {"commit": functaset.version, "top1_last": accuracies[-1], "top1_best": max(accuracies)}


def classifier_learner(
    config: TrainClassifierConfig,
    latent_shape: tuple[int, int, int],
    classes: int,
    batches: Batches,
    ranks: Ranks,
    seed: int,
) -> Learner:
    """Build the classifier of the config, initialised from `seed`, and its step on these batches."""
    device, part = ranks.device, ranks.part(config.batch)
    shape = (config.batch, *latent_shape)
    work = step_work(classifier_cost(config.model, latent_shape, classes), config, ranks)
    torch.manual_seed(seed)
    model = build_classifier(config.model, latent_shape, classes).to(device)

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        return classification_loss(model(x), labels, config.label_smoothing)

    tokens = token_count(config.model, latent_shape)
    batch_gradients, mode = batch_loss(loss, config, ranks, work, "classifier.compile", tokens, model)

    def gradients(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        x, labels = batches(step)
        if config.noise:  # drawn for the whole batch, so that an example's noise does not depend on the rank
            x = x + config.noise * torch.randn(shape, generator=generator, device=device)[part]
        return {"loss": batch_gradients([x, labels])}

    return Learner(model, classifier_optimizer(model, config), gradients, work, mode, overlaps(ranks, mode))


def _test_accuracy(job: ClassifierJob, functaset: Functaset, normalizer: Normalizer, device: torch.device) -> Any:
    """Return a function of the model: its accuracy on the test rows, which are read again if they do not fit."""
    name = f"{job.functaset}, split 'test'"
    if not fits_as_floats(functaset, "test"):
        parts = SplitParts(functaset, "test")
        for part in parts:
            check_labels(name, part.labels.numpy(), job.classes)
        return lambda model: {"accuracy": _share_right(model, parts, normalizer)}
    test = load_split(functaset, "test")
    check_labels(name, test.labels.numpy(), job.classes)
    z, labels = normalizer.normalize(test.z).to(device), test.labels.to(device)

    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"accuracy": (logits_of(model, z).argmax(1) == labels).float().mean().item()}

    return evaluate


def _share_right(model: nn.Module, parts: Iterable[Split], normalizer: Normalizer) -> float:
    right = rows = 0
    for part in parts:
        right += int((logits_of(model, normalizer.normalize(part.z)).argmax(1).cpu() == part.labels).sum())
        rows += len(part.labels)
    return right / rows
