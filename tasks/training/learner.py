"""The parts of one training run, which each kind of training passes to the loop."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from functa.models.latents.normalize import Normalizer
from functa.storage.functaset.functaset import Functaset
from functa.storage.places.address import open_location
from functa.storage.places.location import Location
from functa.tasks.config import TrainingConfig
from functa.tasks.training.ranks import Ranks
from functa.tasks.training_jobs import TrainingJob

Row = dict[str, Any]

Emit = Callable[[Row], None]


class NonFiniteLoss(Exception):
    """The loss or its gradient is NaN or infinite; the last good checkpoint is kept."""


# Adds the gradients of this rank's part of the step to the parameters; returns the step's figures, "loss" among them,
# as scalar tensors on the model's device. Gradients and figures are summed over the ranks, so each rank weighs its own
# by its share of the batch.
Gradients = Callable[[int, torch.Generator], dict[str, Tensor]]


@dataclass(frozen=True)
class Work:
    """The cost of one step over all processes: FLOPs (three forward passes), and the FLOP/s of their matmuls."""

    flops: float
    peak: float

    def rates(self, steps_per_second: float) -> dict[str, float]:
        """Return {flops_per_s, utilization} for a row of the curve."""
        rate = steps_per_second * self.flops
        return {"flops_per_s": round(rate), "utilization": float(f"{rate / self.peak:.4g}")}


@dataclass(frozen=True)
class Learner:
    """A model, its optimiser and its training step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    gradients: Gradients
    work: Work | None = None  # None: rows do not report FLOP/s
    mode: str = ""  # how a step is computed: eager or compiled, and why
    summed: bool = False  # gradients that the step returns are summed over the ranks already

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the optimiser updates, in its order."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]


@dataclass
class Run:
    """One training run, as the loop needs it."""

    stage: str  # its name in logs, rows and seeds
    config: TrainingConfig
    seed: int
    learner: Learner
    output: Location
    metadata: dict[str, Any]  # stored in every checkpoint; a checkpoint with another "digest" is not resumed
    emit: Emit = lambda row: None
    # Evaluates the model (the averaged one, if there is one); returns figures such as {"accuracy": 0.97}.
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None
    evaluate_every: int = 0
    ranks: Ranks = field(default_factory=Ranks)
    # Number of training images, and hex digits that identify them: all ranks, which read them separately, must agree.
    examples: tuple[int, str] = (0, "0")
    rows: list[Row] = field(default_factory=list)
    saved: int | None = None  # step of the checkpoint that was written or loaded last


def run_of(
    job: TrainingJob, learner: Learner, ranks: Ranks, emit: Emit, metadata: dict[str, Any], **others: Any
) -> Run:
    """Return the run of a job; `metadata` is added to the job's digest, `others` are fields of Run."""
    return Run(
        stage=job.kind, config=job.training, seed=job.seed, learner=learner, output=open_location(job.output),
        metadata={"digest": job.digest} | metadata, emit=emit, ranks=ranks, **others,
    )  # fmt: skip


def latent_metadata(functaset: Functaset, normalizer: Normalizer) -> dict[str, Any]:
    """Return the metadata about latents that a model trained on them records."""
    return {
        "latent_shape": list(functaset.latent_shape),
        "normalizer": normalizer.state(),
        "functaset": {"fingerprint": functaset.fingerprint, "version": functaset.version},
    }
