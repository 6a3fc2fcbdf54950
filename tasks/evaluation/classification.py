"""Classification of test latents: top-1, top-5, calibration, accuracy by class, what is confused with what."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from functa.models.compute.device import choose_device
from functa.models.measures.metrics import (
    accuracy,
    confusion_matrix,
    expected_calibration_error,
    reliability,
    top_accuracy,
)
from functa.storage.functaset.functaset import Functaset
from functa.tasks.evaluation.evaluator_input import SILENT, EvaluationJob, Messages, write_arrays
from functa.tasks.inputs.latents import load_split
from functa.tasks.trained import load_classifier, logits_of


def measure(job: EvaluationJob, messages: Messages = SILENT) -> dict[str, Any]:
    """Measure top1_test, top5_test (of more than 5 classes), ece, accuracy_by_class and empty_classes.

    With the last weights, averaged where there is an average. Writes confusion [K, K] and the reliability diagram.
    """
    device = choose_device(job.device)
    model, normalizer, meta = load_classifier(job.classifier)
    test = load_split(Functaset.open(job.functaset), "test")
    logits = logits_of(model.to(device), normalizer.normalize(test.z)).cpu()
    probabilities = torch.softmax(logits, -1)
    confusion = confusion_matrix(logits, test.labels).numpy()
    count, confidence, correct = reliability(probabilities, test.labels)
    write_arrays(
        job.output,
        "classification",
        confusion=confusion,
        bin_count=count.numpy(),
        bin_confidence=confidence.numpy(),
        bin_accuracy=correct.numpy(),
    )
    names = meta.get("class_names") or [str(number) for number in range(logits.shape[1])]
    return {
        "top1_test": accuracy(logits, test.labels),
        **_top5(logits, test.labels),
        "ece": expected_calibration_error(probabilities, test.labels),
        **by_class(confusion, names),
    }


def _top5(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return top5_test; nothing of five classes or fewer, where any guess is among the first five."""
    return {"top5_test": top_accuracy(logits, labels, 5)} if logits.shape[1] > 5 else {}


def by_class(confusion: np.ndarray, names: list[str]) -> dict[str, Any]:
    """Return accuracy_by_class {name: share} of the classes that have images; the other names as empty_classes."""
    images = confusion.sum(1)
    shares = {name: float(confusion[k, k] / images[k]) for k, name in enumerate(names) if images[k]}
    empty = [name for k, name in enumerate(names) if not images[k]]
    return {"accuracy_by_class": shares} | ({"empty_classes": empty} if empty else {})
