"""Classification of test latents: accuracy by class, the class without images, what the report is left."""

import numpy as np
import pytest
import torch

from functa.flows.config.load import load_config
from functa.storage.config import QuantizationConfig
from functa.storage.functaset.functaset import Functaset
from functa.tasks.evaluation import classification
from functa.tasks.evaluation.classification import by_class
from functa.tasks.evaluation.evaluator_input import EvaluationJob, read_arrays
from functa.tasks.inputs.latents import load_split
from functa.tasks.trained import load_classifier, logits_of
from functa.tasks.training.classifier import run
from functa.tasks.training_jobs import ClassifierJob
from tests.helpers.storage.functasets import filled

NAMES = ("<b>zero</b>", "$\\frac", "{{ 7 * 7 }}", "3", "4", "5", "6", "7", "8", "9")
SETTINGS = ("steps=4", "warmup=0", "batch=6", "model.width=16", "model.depth=1", "model.heads=2")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> EvaluationJob:
    """A classifier of 10 classes, hardly trained; the functaset's test split holds the first 6 of them."""
    folder = tmp_path_factory.mktemp("classified")
    filled(str(folder / "z"))
    config = load_config("digits", [f"classifier.{setting}" for setting in SETTINGS])
    assert config.classifier is not None
    run(
        ClassifierJob(
            seed=0, classifier=config.classifier, functaset=str(folder / "z"), classes=10, class_names=NAMES,
            device="cpu", output=str(folder / "classifier"), digest="d",
        ),
        lambda row: None,
    )  # fmt: skip
    return EvaluationJob(
        seed=0, images=config.images, quantization=QuantizationConfig(), evaluation=config.evaluation,
        calibration_images=8, functaset=str(folder / "z"), field="", classifier=str(folder / "classifier"),
        output=str(folder / "run"), device="cpu",
    )  # fmt: skip


def test_figures_and_arrays_follow_from_the_logits(job: EvaluationJob) -> None:
    figures = classification.measure(job)
    model, normalizer, _ = load_classifier(job.classifier)
    test = load_split(Functaset.open(job.functaset), "test")
    order = logits_of(model, normalizer.normalize(test.z)).argsort(1, descending=True).numpy()
    labels = test.labels.numpy()
    right = order[:, 0] == labels
    assert figures["top1_test"] == pytest.approx(right.mean())
    assert figures["top5_test"] == pytest.approx((order[:, :5] == labels[:, None]).any(1).mean())
    assert figures["accuracy_by_class"] == {NAMES[k]: float(right[labels == k].mean()) for k in range(6)}
    assert figures["empty_classes"] == list(NAMES[6:])
    assert all(np.isfinite(value) for value in figures["accuracy_by_class"].values())
    arrays = read_arrays(job.output, "classification")
    for row, column in np.ndindex(10, 10):
        assert arrays["confusion"][row, column] == ((labels == row) & (order[:, 0] == column)).sum()
    assert arrays["bin_count"].sum() == len(labels) and len(arrays["bin_count"]) == 15


def test_top_5_is_absent_for_five_classes_or_fewer() -> None:
    assert classification._top5(torch.randn(4, 5), torch.zeros(4, dtype=torch.int64)) == {}
    assert classification._top5(torch.randn(4, 6), torch.zeros(4, dtype=torch.int64)).keys() == {"top5_test"}


def test_only_a_class_without_images_is_named_empty() -> None:
    assert by_class(np.array([[3, 1], [0, 2]]), ["a", "b"]) == {"accuracy_by_class": {"a": 0.75, "b": 1.0}}
    assert by_class(np.array([[3, 1], [0, 0]]), ["a", "b"]) == {
        "accuracy_by_class": {"a": 0.75}, "empty_classes": ["b"],
    }  # fmt: skip
