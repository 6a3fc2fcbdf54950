"""What one training run is made of: the words between a kind of training and the loop."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from functa.storage.errors import FunctaError
from functa.storage.places.location import Location
from functa.tasks.config import TrainingConfig
from functa.tasks.training.ranks import Ranks
from functa.tasks.training.step import Work

Row = dict[str, Any]

Emit = Callable[[Row], None]


class NonFiniteLoss(FunctaError):
    """The loss or its gradient is NaN or infinite; the last good checkpoint stands."""


# Adds the gradients of this rank's part of the step to the parameters; returns the step's figures, "loss" among them,
# scalar tensors on the module's device. Gradients and figures are summed over the ranks, so each rank weighs its own by
# its share of the batch.
Gradients = Callable[[int, torch.Generator], dict[str, Tensor]]


@dataclass(frozen=True)
class Learner:
    """A model, what updates it, and its step; what a step costs, and how it is computed (eager, compiled)."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    gradients: Gradients
    work: Work
    mode: str


@dataclass
class Run:
    """What the loop needs to know of one training run."""

    stage: str  # its name in logs, rows and seeds
    config: TrainingConfig
    seed: int
    module: nn.Module
    gradients: Gradients
    optimizer: torch.optim.Optimizer
    output: Location
    metadata: dict[str, Any]  # stored in every checkpoint; its "digest" tells whose checkpoint it is
    emit: Emit = lambda row: None
    # Called with the module to judge (the average, where there is one) -> figures such as {"accuracy": .97}.
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None
    evaluate_every: int = 0
    ranks: Ranks = field(default_factory=Ranks)
    work: Work | None = None  # what a step costs; None: rows tell no rate of it
    # How many images it trains on, and hex digits of which: ranks that read them each for themselves must agree.
    examples: tuple[int, str] = (0, "0")
    rows: list[Row] = field(default_factory=list)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What the optimiser updates, in its order."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]
