"""The outer optimiser: two under one roof."""

import copy

import pytest
import torch

from models.config import FieldConfig, InnerConfig
from models.field import Field
from tasks.config import MetaTrainConfig
from tasks.training.optimizer import outer_optimizer


def make(depth: int = 4) -> Field:
    return Field(FieldConfig(spatial=2, channels=4, width=8, depth=depth), InnerConfig(), 1, seed=2)


def step(field: Field, optimizers: list[torch.optim.Optimizer], number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for parameter in field.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    for optimizer in optimizers:
        optimizer.step()


def equal(a: Field, b: Field) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def test_it_moves_each_parameter_as_its_own_optimiser_would() -> None:
    together, apart = make(), make()
    ours = outer_optimizer(together, MetaTrainConfig(optimizer="muon", learning_rate=3e-3, muon_factor=2))
    matrices = [*list(apart.weights)[1:-1], apart.modulation_weight]
    rest = [p for p in apart.parameters() if all(p is not matrix for matrix in matrices)]
    theirs = [
        torch.optim.Muon(matrices, lr=6e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.Adam(rest, lr=3e-3),
    ]
    for number in range(5):
        step(together, [ours], number)
        step(apart, theirs, number)
    assert equal(together, apart)
    assert not equal(together, make())


def test_a_rate_set_on_its_groups_reaches_both() -> None:
    field = make()
    before = copy.deepcopy(field)
    optimizer = outer_optimizer(field, MetaTrainConfig(optimizer="muon"))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    step(field, [optimizer], 0)
    assert equal(field, before)


@pytest.mark.parametrize("kind", ["muon", "adam"])
def test_state_that_was_saved_and_loaded_goes_on_bit_for_bit(kind: str) -> None:
    config = MetaTrainConfig(optimizer=kind, learning_rate=3e-3)
    whole, parted = make(), make()
    first, second = outer_optimizer(whole, config), outer_optimizer(parted, config)
    for number in range(3):
        step(whole, [first], number)
        step(parted, [second], number)
    resumed = outer_optimizer(parted, config)
    resumed.load_state_dict(second.state_dict())
    for number in range(3, 6):
        step(whole, [first], number)
        step(parted, [resumed], number)
    assert equal(whole, parted)
