"""Optimisers: Adam and AdamW as in the paper, or Muon on hidden matrices and Adam on the rest."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from functa.models.field.field import Field
from functa.models.latents.classifier import decay_groups, hidden_matrices
from functa.tasks.config import MetaTrainConfig, TrainClassifierConfig


def outer_optimizer(field: Field, config: MetaTrainConfig) -> torch.optim.Optimizer:
    """Return Adam for everything, or Muon for hidden weights, mixer and modulation map and Adam for the rest.

    Muon includes the map since it decides how well the few inner steps are conditioned. First layer, output layer,
    biases and rates always use Adam, the rates at a multiple of the learning rate.
    """
    lr = config.learning_rate
    if config.optimizer == "adam":
        return torch.optim.Adam(_rates_apart(field, field.parameters(), config), lr=lr, fused=True)
    mixing = field.mixer.weights if field.mixer else ()
    matrices = [*list(field.weights)[1:-1], field.modulation_weight, *mixing]
    taken = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in field.parameters() if id(parameter) not in taken]
    return MuonAndAdam(matrices, _rates_apart(field, others, config), lr, config.muon_factor)


def _rates_apart(field: Field, parameters: Iterable[nn.Parameter], config: MetaTrainConfig) -> list[dict[str, Any]]:
    """Return the parameters as one group, or as two if the rates have a learning rate of their own."""
    factor = config.rates_factor
    if factor == 1:
        return [{"params": list(parameters)}]
    others = [parameter for parameter in parameters if parameter is not field.rates]
    return [{"params": others}, {"params": [field.rates], "lr": factor * config.learning_rate, "factor": factor}]


def classifier_optimizer(model: nn.Module, config: TrainClassifierConfig) -> torch.optim.Optimizer:
    """Return AdamW for everything, or Muon for the matrices of blocks and hidden layers and AdamW for the rest.

    Both apply weight decay to matrices only, with the same factor per step.
    """
    if config.optimizer == "adam":
        return torch.optim.AdamW(decay_groups(model, config.weight_decay), lr=config.learning_rate, fused=True)
    matrices = hidden_matrices(model)
    taken = {id(matrix) for matrix in matrices}
    others = [
        group | {"params": [parameter for parameter in group["params"] if id(parameter) not in taken]}
        for group in decay_groups(model, config.weight_decay)
    ]
    return MuonAndAdam(matrices, others, config.learning_rate, config.muon_factor, config.weight_decay)


class MuonAndAdam(torch.optim.Optimizer):
    """torch's Muon for matrices and its AdamW for other parameters as one optimiser: one state, one list of groups.

    Muon's step is the orthogonal factor of the momentum (Jordan et al. 2024), scaled to the size of an Adam step
    (Liu et al. 2025) and then by `factor`, which its groups keep for the learning-rate schedule. `weight_decay` applies
    to the matrices, relative to Adam's rate; groups of other parameters bring their own, or have none.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        factor: float,
        weight_decay: float = 0.0,
    ) -> None:
        decay = weight_decay / factor
        self._parts = (
            torch.optim.Muon(matrices, lr=factor * lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=lr, weight_decay=0.0, fused=True),
        )
        for group in self._parts[0].param_groups:
            group["factor"] = factor
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self.param_groups = [
            group for part in self._parts for group in part.param_groups
        ]  # the parts' own groups, not copies

    def step(self, closure: Any = None) -> Any:  # the base class promises a closure's loss; no closure is ever given
        """Do one step of both."""
        for part in self._parts:
            part.step(closure)

    def state_dict(self) -> dict[str, Any]:
        """Return the state like one optimiser's: parameters are numbered consecutively, matrices first."""
        state, groups = dict[int, Any](), []
        for first, part in zip(self._firsts(), self._parts):
            own = part.state_dict()
            state |= {first + index: value for index, value in own["state"].items()}
            groups += [group | {"params": [first + i for i in group["params"]]} for group in own["param_groups"]]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what state_dict returned."""
        groups = iter(state_dict["param_groups"])
        for first, part in zip(self._firsts(), self._parts):
            own = part.state_dict()["param_groups"]
            indices = {index for group in own for index in group["params"]}
            state = {i - first: value for i, value in state_dict["state"].items() if i - first in indices}
            part.load_state_dict(
                {"state": state, "param_groups": [next(groups) | {"params": group["params"]} for group in own]}
            )
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    def _firsts(self) -> tuple[int, int]:
        return 0, sum(len(group["params"]) for group in self._parts[0].param_groups)
