"""Classification of test latents: top-1 and calibration."""

from typing import Any

import torch

from models.metrics import accuracy, expected_calibration_error
from storage.functaset import Functaset
from tasks.evaluation.job import EvaluationJob
from tasks.training.classifier import load_classifier, logits_of
from tasks.training.device import choose_device
from tasks.training.latents import load_split


def measure(job: EvaluationJob) -> dict[str, Any]:
    """top1_test (last weights, averaged where there is an average) and ece."""
    device = choose_device(job.device)
    model, normalizer, _ = load_classifier(job.classifier)
    test = load_split(Functaset.open(job.functaset), "test")
    logits = logits_of(model.to(device), normalizer.normalize(test.z)).cpu()
    return {
        "top1_test": accuracy(logits, test.labels),
        "ece": expected_calibration_error(torch.softmax(logits, -1), test.labels),
    }
