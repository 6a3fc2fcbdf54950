"""The processes (ranks) of one training run: each one's part of the batch, and the sum that they share every step.

Every rank holds the whole model and computes its part of the same global batch. One all-reduce over a flat buffer
carries gradients, figures and the request to stop, so all ranks take the same decisions (a loss that is not finite, the
end) at the same step without another message, and equal updates keep their weights equal.
"""

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from functa.models.compute.device import choose_device
from functa.storage.errors import FunctaError, StorageError, TransientError, one_line

CPU = torch.device("cpu")

DIGEST_DIGITS = 15  # hex digits that always fit into an int64

STOPPED = 128 + signal.SIGTERM  # exit status of a rank that was asked to stop

STORE = "FUNCTA_RANKS_STORE"  # environment variable: the file through which ranks find each other

# The others wait while the first rank evaluates. The launcher notices a rank that dies, not this timeout.
TIMEOUT = timedelta(hours=2)


class RankLost(FunctaError):
    """The other training processes cannot be reached: one has ended, or the connection failed."""


@dataclass(frozen=True)
class Ranks:
    """This process and its position among those of its run."""

    rank: int = 0
    world: int = 1
    device: torch.device = CPU

    @property
    def first(self) -> bool:
        """Return whether this rank evaluates, saves and reports."""
        return self.rank == 0

    def part(self, batch: int) -> slice:
        """Return this rank's contiguous part of a global batch; parts differ by one example at most.

        Raises ValueError if there are more ranks than examples.
        """
        if batch < self.world:
            raise ValueError(f"a batch of {batch} cannot be split over dispatch.devices={self.world}: lower it")
        return slice(batch * self.rank // self.world, batch * (self.rank + 1) // self.world)

    def share(self, batch: int) -> float:
        """Return this rank's fraction of the batch: the weight of its mean loss."""
        part = self.part(batch)
        return (part.stop - part.start) / batch

    def sum_up(
        self, parameters: Sequence[nn.Parameter], figures: dict[str, Tensor], asked: bool
    ) -> tuple[dict[str, Tensor], Tensor | bool]:
        """Sum gradients (in place) and figures over the ranks; return figures and whether a rank was asked to stop.

        With several ranks the latter is a tensor that may still be computed: bool() of it waits.
        """
        if self.world == 1:
            return figures, asked
        pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        own = torch.stack([*(value.detach().float() for value in figures.values()), _number(asked, self.device)])
        flat = torch.cat([piece.flatten() for piece in [*pieces, own]])
        _all_reduce(flat, dist.ReduceOp.SUM)
        *summed, own = flat.split([piece.numel() for piece in [*pieces, own]])
        for parameter, piece in zip(parameters, summed):
            parameter.grad = piece.view_as(parameter)
        return dict(zip(figures, own[:-1])), own[-1] > 0

    def any_of(self, flag: bool) -> bool:
        """Return whether the flag is set on a rank, the same answer on all of them."""
        if self.world == 1:
            return flag
        shared = _number(flag, self.device)
        _all_reduce(shared, dist.ReduceOp.MAX)
        return bool(shared)

    def check_equal(self, step: int, count: int, digest: str) -> None:
        """Raise StorageError unless all ranks continue from the same step with the same training images.

        Raises TransientError if the images differ: a read failed in one rank and succeeded in another.
        """
        if self.world == 1:
            return
        own = torch.tensor([step, count, int(digest[:DIGEST_DIGITS], 16)], device=self.device)
        ends = torch.stack([own, -own])
        _all_reduce(ends, dist.ReduceOp.MAX)
        most, least = ends[0].tolist(), (-ends[1]).tolist()
        if most[0] != least[0]:
            raise StorageError(
                f"training processes found different checkpoints (steps {least[0]} and {most[0]}): "
                f"check that all of them see the same files"
            )
        if most != least:
            raise TransientError(
                f"training processes see different training images (from {least[1]} to {most[1]} of them): one could "
                f"not read what another could, or they have changed; run the same command again"
            )


def _number(asked: bool, device: torch.device) -> Tensor:
    return torch.full((), float(asked), device=device)  # filled on the device: a copy from the host would wait


def _all_reduce(tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
    try:
        dist.all_reduce(tensor, operation)
    except RuntimeError as error:  # both backends raise it when a peer's connection was closed
        reason = one_line(error).split(". ")[0]  # the rest is advice for other programs
        raise RankLost(f"lost the other training processes: {reason}") from error


def join_ranks(device: str) -> Ranks:
    """Return this process's rank, from the launcher's environment; without a launcher it is the only one.

    Ranks find each other through a file and communicate over the loopback interface only: nothing listens to the
    network. Raises ValueError if the device is not available.
    """
    chosen = choose_device(device)
    if STORE not in os.environ:
        return Ranks(device=chosen)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if chosen.type == "cuda":
        if torch.cuda.device_count() < world:
            raise ValueError(f"dispatch.devices={world}, but torch sees {torch.cuda.device_count()} GPUs: lower it")
        chosen = torch.device("cuda", rank)
        torch.cuda.set_device(chosen)
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    os.environ |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
    dist.init_process_group(
        "nccl" if chosen.type == "cuda" else "gloo", init_method=f"file://{os.environ[STORE]}",
        rank=rank, world_size=world, timeout=TIMEOUT,
    )  # fmt: skip
    return Ranks(rank, world, chosen)


def leave_ranks() -> None:
    """Close the connections after the last step; a run that failed just ends."""
    if dist.is_initialized():
        dist.destroy_process_group()
