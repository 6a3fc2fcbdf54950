"""Muon and Adam as one optimiser."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from functa.models.config import ClassifierConfig, FieldConfig, InnerConfig
from functa.models.field.field import Field
from functa.models.latents.classifier import build_classifier, decay_groups
from functa.tasks.config import MetaTrainConfig, TrainClassifierConfig
from functa.tasks.training.optimizer import classifier_optimizer, outer_optimizer

KINDS = {
    "transformer": ClassifierConfig(width=16, depth=2, heads=2),
    "mlp": ClassifierConfig(kind="mlp", width=16, depth=2),
}


def make(depth: int = 4) -> Field:
    return Field(FieldConfig(spatial=2, channels=4, width=8, depth=depth), InnerConfig(), 1, seed=2)


def step(field: nn.Module, optimizers: list[torch.optim.Optimizer], number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for parameter in field.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    for optimizer in optimizers:
        optimizer.step()


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def test_each_parameter_moves_as_with_its_own_optimiser() -> None:
    together, apart = make(), make()
    ours = outer_optimizer(together, MetaTrainConfig(optimizer="muon", learning_rate=3e-3, muon_factor=2))
    matrices = [*list(apart.weights)[1:-1], apart.modulation_weight]
    rest = [p for p in apart.parameters() if all(p is not matrix for matrix in matrices)]
    theirs = [
        torch.optim.Muon(matrices, lr=6e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.Adam(rest, lr=3e-3, fused=True),
    ]
    for number in range(5):
        step(together, [ours], number)
        step(apart, theirs, number)
    assert equal(together, apart)
    assert not equal(together, make())


def test_a_rate_set_on_the_groups_applies_to_both() -> None:
    field = make()
    before = copy.deepcopy(field)
    optimizer = outer_optimizer(field, MetaTrainConfig(optimizer="muon"))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    step(field, [optimizer], 0)
    assert equal(field, before)


def classifier(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return build_classifier(KINDS[kind], (2, 2, 4), 10)


@pytest.mark.parametrize("kind", KINDS)
def test_muon_updates_a_classifiers_hidden_matrices_and_both_decay_the_same_weights(kind: str) -> None:
    config = TrainClassifierConfig(optimizer="muon", learning_rate=3e-3, muon_factor=2, weight_decay=0.5)
    together, apart = classifier(kind), classifier(kind)
    ours = classifier_optimizer(together, config)
    matrices = [p for n, p in apart.named_parameters() if n.endswith("weight") and p.ndim == 2 and "head" not in n]
    matrices = matrices[:-1] if kind == "mlp" else matrices  # its last layer has no name
    taken = {id(matrix) for matrix in matrices}
    rest = [g | {"params": [p for p in g["params"] if id(p) not in taken]} for g in decay_groups(apart, 0.5)]
    theirs = [
        torch.optim.Muon(matrices, lr=6e-3, weight_decay=0.25, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=3e-3, fused=True),
    ]
    for number in range(3):
        step(together, [ours], number)
        step(apart, theirs, number)
    assert len(matrices) == {"transformer": 8, "mlp": 2}[kind]
    assert equal(together, apart)


LEARNERS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], torch.optim.Optimizer]]] = {
    "field, adam": (make, lambda m: outer_optimizer(m, MetaTrainConfig(optimizer="adam", learning_rate=3e-3))),
    "field, muon": (make, lambda m: outer_optimizer(m, MetaTrainConfig(optimizer="muon", learning_rate=3e-3))),
    "classifier, adam": (partial(classifier, "mlp"), lambda m: classifier_optimizer(m, TrainClassifierConfig())),
    "classifier, muon": (
        partial(classifier, "transformer"),
        lambda m: classifier_optimizer(m, TrainClassifierConfig(optimizer="muon")),
    ),
}


@pytest.mark.parametrize("learner", LEARNERS)
def test_saved_and_loaded_state_continues_bit_for_bit(learner: str) -> None:
    build, optimizer = LEARNERS[learner]
    whole, parted = build(), build()
    first, second = optimizer(whole), optimizer(parted)
    for number in range(3):
        step(whole, [first], number)
        step(parted, [second], number)
    resumed = optimizer(parted)
    resumed.load_state_dict(second.state_dict())
    for number in range(3, 6):
        step(whole, [first], number)
        step(parted, [resumed], number)
    assert equal(whole, parted)
