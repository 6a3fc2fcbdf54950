"""Optimisers: Adam and AdamW as the paper, or Muon on hidden matrices beside them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from functa.models.field.field import Field
from functa.models.latents.classifier import decay_groups, hidden_matrices
from functa.tasks.config import MetaTrainConfig, TrainClassifierConfig


def outer_optimizer(field: Field, config: MetaTrainConfig) -> torch.optim.Optimizer:
    """Adam on everything, or Muon on hidden weights and modulation map and Adam on the rest.

    The map is among them since it decides how well the few inner steps are conditioned. First layer, output layer,
    biases and rates stay with Adam.
    """
    if config.optimizer == "adam":
        return torch.optim.Adam(field.parameters(), lr=config.learning_rate, fused=True)
    matrices = [*list(field.weights)[1:-1], field.modulation_weight]
    taken = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in field.parameters() if id(parameter) not in taken]
    return MuonAndAdam(matrices, others, config.learning_rate, config.muon_factor)


def classifier_optimizer(model: nn.Module, config: TrainClassifierConfig) -> torch.optim.Optimizer:
    """AdamW on everything, or Muon on the matrices of blocks and hidden layers and AdamW on the rest.

    Both decay matrices alone, and weights by the same factor a step.
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
    """torch's Muon on matrices, its AdamW on other parameters, under one roof: one state, one list of groups.

    Muon takes the orthogonal factor of the momentum as its step (Jordan et al. 2024), scaled to the size of an Adam
    step (Liu et al. 2025) and then by `factor`, which its groups carry for whoever sets their rates. `weight_decay` is
    the matrices', relative to Adam's rate; others bring their own, by groups, or have none.
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
        self.param_groups = [group for part in self._parts for group in part.param_groups]  # theirs, not copies

    def step(self, closure: Any = None) -> None:
        """One step of both."""
        for part in self._parts:
            part.step(closure)

    def state_dict(self) -> dict[str, Any]:
        """As one optimiser's: parameters are numbered through, matrices first."""
        state, groups = {}, []
        for first, part in zip(self._firsts(), self._parts):
            own = part.state_dict()
            state |= {first + index: value for index, value in own["state"].items()}
            groups += [group | {"params": [first + i for i in group["params"]]} for group in own["param_groups"]]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of state_dict."""
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
