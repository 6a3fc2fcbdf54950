"""The processes (ranks) of one training run: each one's part of the batch, and the sum that they share every step.

Every rank holds the whole model and computes its part of the same global batch. One all-reduce over a flat buffer
carries gradients, figures and the request to stop, so all ranks take the same decisions (a loss that is not finite, the
end) at the same step without another message, and equal updates keep their weights equal. Between machines the
gradients go ahead in DDP's buckets, while the backward pass goes on.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from functa.models.compute.device import choose_device
from functa.storage.errors import FunctaError, StorageError, TransientError, one_line
from functa.tasks.training.meeting import interface_to, meet
from functa.tasks.training_jobs import TrainingJob

CPU = torch.device("cpu")

DIGEST_DIGITS = 15  # hex digits that always fit into an int64

STOPPED = 128 + signal.SIGTERM  # exit status of a rank that was asked to stop

IFNAMES = {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"}  # environment variables: the interface of the connections

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
    nodes: int = 1  # machines, of equally many ranks

    @property
    def on_machine(self) -> int:
        """Return how many ranks share the memory of this machine."""
        return self.world // self.nodes

    @property
    def first(self) -> bool:
        """Return whether this rank evaluates, saves and reports."""
        return self.rank == 0

    @property
    def first_on_machine(self) -> bool:
        """Return whether this rank does what one rank does for all of its machine."""
        return self.rank % self.on_machine == 0

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

    def overlapped(self, model: nn.Module, loss: Callable[..., Tensor]) -> DistributedDataParallel:
        """Return the model's loss as a module whose backward pass sums the gradients over the ranks under way.

        Buckets of gradients are sent while the next ones are computed: over a network, sending takes as long.
        """

        class Loss(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, *inputs: Tensor) -> Tensor:
                return loss(*inputs)

        where = [self.device] if self.device.type == "cuda" else None
        module = DistributedDataParallel(Loss(), device_ids=where, broadcast_buffers=False)
        module.register_comm_hook(None, _sum_bucket)
        return module

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


def _sum_bucket(_: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Sum a bucket of gradients: each rank has weighed its own by its share of the batch."""
    summed: torch.futures.Future[list[Tensor]] = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return summed.then(lambda done: done.value()[0])


@contextmanager
def sending(module: DistributedDataParallel, last: bool) -> Iterator[None]:
    """Enter the passes of one part of the batch: those of the last one send the sum. Raises RankLost."""
    try:
        with nullcontext() if last else module.no_sync():
            yield
    except RuntimeError as error:
        if "memory" in str(error):
            raise
        raise _lost(error) from error


def _lost(error: RuntimeError) -> RankLost:
    reason = one_line(error).split(". ")[0]  # the rest is advice for other programs
    return RankLost(f"lost the other training processes: {reason}")


def _number(asked: bool, device: torch.device) -> Tensor:
    return torch.full((), float(asked), device=device)  # filled on the device: a copy from the host would wait


def _all_reduce(tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
    try:
        dist.all_reduce(tensor, operation)
    except RuntimeError as error:  # both backends raise it when a peer's connection was closed
        raise _lost(error) from error


def join_ranks(job: TrainingJob) -> Ranks:
    """Return this process's rank, from job and launcher; without a launcher it is the only one of its machine.

    Ranks of one machine find each other through a file and communicate over the loopback interface only: nothing
    listens to the network. Those of several find each other through the first one's store (meeting.py), and use the
    interface on the way to it unless GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names another. Raises ValueError if the
    device is not available.
    """
    interface: str | None
    device, local = choose_device(job.device), int(os.environ.get("RANK", "0"))  # of the launcher on this machine
    if job.nodes == 1 and STORE not in os.environ:
        return Ranks(device=device)
    rank, world = job.node * job.devices + local, job.nodes * job.devices
    if device.type == "cuda":
        if torch.cuda.device_count() < job.devices:
            raise ValueError(
                f"dispatch.devices={job.devices}, but torch sees {torch.cuda.device_count()} GPUs: lower it"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if job.rendezvous is None:
        interface, given = "lo0" if sys.platform == "darwin" else "lo", dict[str, str]()
        store: dict[str, Any] = {"init_method": f"file://{os.environ[STORE]}"}
    else:
        interface = interface_to(job.rendezvous)
        given = {name: os.environ[name] for name in IFNAMES & os.environ.keys()}
        store = {"store": meet(job, local)}
    if interface is not None:
        os.environ |= dict.fromkeys(IFNAMES, interface) | given
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=world, timeout=TIMEOUT, **store
        )
    except RuntimeError as error:
        raise RankLost(f"the training processes could not connect to each other: {one_line(error)}") from error
    return Ranks(rank, world, device, job.nodes)


def leave_ranks() -> None:
    """Close the connections after the last step; a run that failed just ends."""
    if dist.is_initialized():
        dist.destroy_process_group()
