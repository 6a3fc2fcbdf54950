"""What a training step costs and how near that comes to what the device can do."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from models.flops import forward_flops, matmul_rate
from tasks.config import LatentTrainingConfig
from tasks.training.ranks import Ranks


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
