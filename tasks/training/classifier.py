"""Training of a classifier on latents (App. C)."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.classifier import build_classifier, classification_loss, decay_groups
from models.config import ClassifierConfig, Config
from models.normalize import Normalizer
from storage.functaset import Functaset
from storage.locations import open_location
from tasks.config import TrainClassifierConfig
from tasks.training.latents import Split, load_split, load_training, training_normalizer
from tasks.training.loop import train
from tasks.training.ranks import join_ranks
from tasks.training.run import Emit, Run
from tasks.training.saving import best_weights, finished_checkpoint
from tasks.training.seeds import batch_rows, mix, stage_number


class ClassifierJob(Config):
    """One classifier run, as the child process receives it."""

    kind: Literal["classifier"] = "classifier"
    seed: int
    classifier: TrainClassifierConfig
    functaset: str
    version: int | None = None  # the commit; None: the newest
    classes: int
    device: str
    devices: int = 1
    output: str
    digest: str


def run(job: ClassifierJob, emit: Emit) -> dict[str, Any]:
    """Trains the classifier; returns last and best test accuracy (the paper reports the best).

    Over several devices the order of the rows and their noise stay those of one; dropout's masks do not.
    """
    ranks = join_ranks(job.device)
    device = ranks.device
    functaset = Functaset.open(job.functaset, job.version)
    normalizer = training_normalizer(functaset, job.classifier.normalization)
    training, test = load_training(functaset, normalizer, device), load_split(functaset, "test")
    torch.manual_seed(mix(job.seed, stage_number("classifier")))
    model = build_classifier(job.classifier.model, functaset.latent_shape, job.classes).to(device)
    stream = mix(job.seed, stage_number("classifier"))

    batch = job.classifier.batch
    part, share = ranks.part(batch), ranks.share(batch)

    def gradients(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = torch.from_numpy(batch_rows(len(training), batch, stream, step)[part]).to(device)
        x = training(rows)
        if job.classifier.noise:
            noise = torch.randn(batch, *x.shape[1:], generator=generator)[part]  # an example's, whoever computes it
            x = x + job.classifier.noise * noise.to(device)
        loss = share * classification_loss(model.train()(x), training.labels[rows], job.classifier.label_smoothing)
        loss.backward()
        return {"loss": loss}

    run = Run(
        stage="classifier",
        config=job.classifier,
        seed=job.seed,
        module=model,
        gradients=gradients,
        optimizer=torch.optim.AdamW(decay_groups(model, job.classifier.weight_decay), lr=job.classifier.learning_rate),
        output=open_location(job.output),
        metadata=_metadata(job, functaset, normalizer),
        emit=emit,
        evaluate=_test_accuracy(test, normalizer, device),
        evaluate_every=job.classifier.evaluate_every,
        ranks=ranks,
    )
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


def _metadata(job: ClassifierJob, functaset: Functaset, normalizer: Normalizer) -> dict[str, Any]:
    return {
        "digest": job.digest,
        "model": job.classifier.model.model_dump(mode="json"),
        "latent_shape": list(functaset.latent_shape),
        "classes": job.classes,
        "normalizer": normalizer.state(),
        "functaset": {"fingerprint": functaset.fingerprint, "version": functaset.version},
    }


def _test_accuracy(test: Split, normalizer: Normalizer, device: torch.device) -> Any:
    z, labels = normalizer.normalize(test.z).to(device), test.labels.to(device)

    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"accuracy": (logits_of(model, z).argmax(1) == labels).float().mean().item()}

    return evaluate


def logits_of(model: nn.Module, x: Tensor, batch: int = 1024) -> Tensor:
    """Logits [n, K] of inputs [n, ...], in evaluation mode, without gradients."""
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(part) for part in x.split(batch)])
    model.train(training)
    return logits


def load_classifier(uri: str) -> tuple[nn.Module, Normalizer, dict[str, Any]]:
    """A trained classifier, the normaliser of its inputs, and its checkpoint's metadata."""
    checkpoint = finished_checkpoint(uri, "classifier", "train-classifier")
    meta = dict(checkpoint.metadata)
    model = build_classifier(
        ClassifierConfig.model_validate(meta["model"]), tuple(meta["latent_shape"]), meta["classes"]
    )
    model.load_state_dict(best_weights(checkpoint.tensors))
    return model.requires_grad_(False).eval(), Normalizer.from_state(meta["normalizer"]), meta
