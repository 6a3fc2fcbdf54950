"""What a training step costs and how near that comes to what the device can do."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from functa.models.compute.flops import forward_flops, matmul_rate
from functa.models.compute.graph import Function
from functa.tasks.config import LatentTrainingConfig
from functa.tasks.training.ranks import Ranks


@dataclass(frozen=True)
class Work:
    """Of one step over all processes: FLOPs of the method (three forward passes), and FLOP/s of their matmuls."""

    flops: float
    peak: float

    def rates(self, steps_per_second: float) -> dict[str, float]:
        """{flops_per_s, utilization}, as rows of the curve carry them."""
        rate = steps_per_second * self.flops
        return {"flops_per_s": round(rate), "utilization": float(f"{rate / self.peak:.4g}")}


def step_work(
    build: Callable[[], nn.Module], inputs: Sequence[Tensor | None], config: LatentTrainingConfig, ranks: Ranks
) -> Work:
    """Of a step on inputs of a whole batch's shapes; the ceiling is this process's matmul, for each of them."""
    return Work(3.0 * forward_flops(build, inputs), ranks.world * matmul_rate(ranks.device, config.precision))


def parts(count: int, most: int | None) -> list[slice]:
    """`count` examples in as few parts as hold `most` each (None: all), of two sizes at most: each is a graph."""
    number = 1 if most is None else -(-count // most)
    return [slice(count * i // number, count * (i + 1) // number) for i in range(number)]


def compilation(config: LatentTrainingConfig, some: Sequence[slice]) -> str:
    """How to compile for these parts of a step: a CUDA graph's next run would overwrite the gradients of its last."""
    return "on" if config.compile == "graphs" and len(some) > 1 else config.compile


def accumulated(loss_of: Function, some: Sequence[slice], batch: int, inputs: Sequence[Tensor]) -> Tensor:
    """Adds the gradients of these parts' share in a batch, part by part; the share of its loss that is theirs.

    `loss_of` gives the mean over the examples that it is given.
    """
    total = torch.zeros((), device=inputs[0].device)
    for part in some:
        value = (part.stop - part.start) / batch * loss_of(*(tensor[part] for tensor in inputs))
        value.backward()
        total = total + value.detach()
    return total
