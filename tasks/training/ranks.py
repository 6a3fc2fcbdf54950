"""The processes of one training run: which part of the batch is whose, and the one sum that they share every step.

Every rank holds the whole model and computes its part of the same global batch; one all-reduce over a flat buffer
carries gradients, figures and the wish to stop. So all ranks take the same decisions (a loss that is no number, the
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

DIGEST_DIGITS = 15  # hex digits that an int64 holds whatever they are

STOPPED = 128 + signal.SIGTERM  # exit status of a rank that was asked to stop

STORE = "FUNCTA_RANKS_STORE"  # environment variable: the file through which ranks find each other

# Others wait while the first rank validates. A rank that dies is noticed by the launcher, not by this.
TIMEOUT = timedelta(hours=2)


class RankLost(FunctaError):
    """The other training processes cannot be reached: one has ended, or the connection failed."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run."""

    rank: int = 0
    world: int = 1
    device: torch.device = CPU

    @property
    def first(self) -> bool:
        """Whether this is the one that evaluates, saves and speaks."""
        return self.rank == 0

    def part(self, batch: int) -> slice:
        """This rank's contiguous part of a global batch; parts differ by one example at most.

        Raises ValueError where there are more ranks than examples.
        """
        if batch < self.world:
            raise ValueError(f"a batch of {batch} cannot be split over dispatch.devices={self.world}: lower it")
        return slice(batch * self.rank // self.world, batch * (self.rank + 1) // self.world)

    def share(self, batch: int) -> float:
        """The size of this rank's part over the whole: what its mean loss weighs."""
        part = self.part(batch)
        return (part.stop - part.start) / batch

    def sum_up(
        self, parameters: Sequence[nn.Parameter], figures: dict[str, Tensor], asked: bool
    ) -> tuple[dict[str, Tensor], Tensor | bool]:
        """Sums gradients (in place) and figures over the ranks; also whether any rank was asked to stop.

        Of several ranks a tensor, which is not waited for here: bool() of it is.
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

    def check_equal(self, step: int, count: int, digest: str) -> None:
        """Raises StorageError unless all ranks go on from the same step with the same training images.

        TransientError where the images differ: a read failed in one rank that succeeded in another.
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
                f"does every one of them see the same files?"
            )
        if most != least:
            raise TransientError(
                f"training processes see different training images (from {least[1]} to {most[1]} of them): one could "
                f"not read what another could, or they changed meanwhile; run the same command again"
            )


def _number(asked: bool, device: torch.device) -> Tensor:
    return torch.full((), float(asked), device=device)  # filled there: a copy from the host would be waited for


def _all_reduce(tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
    try:
        dist.all_reduce(tensor, operation)
    except RuntimeError as error:  # how both backends tell that a peer's connection was closed
        told = one_line(error).split(". ")[0]  # what follows is advice for another program
        raise RankLost(f"lost the other training processes: {told}") from error


def join_ranks(device: str) -> Ranks:
    """This process's place, from the launcher's environment; alone where there is none.

    Ranks meet through a file and speak over the loopback interface alone: nothing listens to the network.
    Raises ValueError where the device cannot be had.
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
    """After the last step; a run that failed leaves by ending."""
    if dist.is_initialized():
        dist.destroy_process_group()
