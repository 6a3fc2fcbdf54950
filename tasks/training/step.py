"""The gradients of one step on latents: the loss compiled if that saves time, the batch in parts that fit memory."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from functa.models.compute.compilation import COMPILED
from functa.models.compute.compiled_function import Function, graphed
from functa.models.compute.device import matmul_precision
from functa.models.compute.flops import matmul_rate
from functa.models.latents.cost import Cost
from functa.tasks.config import LatentTrainingConfig
from functa.tasks.training.learner import Work
from functa.tasks.training.ranks import Ranks, sending


def step_work(cost: Cost, config: LatentTrainingConfig, ranks: Ranks) -> Work:
    """Return the work of a step of a model of this cost; all ranks have this process's matmul rate."""
    return Work(3.0 * cost.flops * config.batch, ranks.world * matmul_rate(ranks.device, config.precision))


def batch_loss(
    loss: Function,
    config: LatentTrainingConfig,
    ranks: Ranks,
    work: Work,
    key: str,
    tokens: int,
    model: nn.Module,
    eager: str = "",
) -> tuple[Callable[[Sequence[Tensor]], Tensor], str]:
    """Return a function that adds the gradients of this rank's inputs, and how it computes (eager, compiled).

    `loss` is the mean over its examples. The function returns this rank's share of the batch's loss. `key` names the
    config's setting in messages; `model` is the loss's; `eager`, if given, is a reason not to compile.
    """
    part = ranks.part(config.batch)
    some = parts(part.stop - part.start, config.micro_batch)
    # A CUDA graph's next run would overwrite the gradients of its last one.
    how = "on" if config.compile == "graphs" and len(some) > 1 else config.compile
    total = work.flops * config.steps
    loss_of, mode = graphed(loss, config.precision, "off" if eager else how, total, ranks.device, key, tokens)

    mode = f"eager: {eager}" if eager else mode
    together = ranks.overlapped(model, loss_of) if overlaps(ranks, mode) else None

    def accumulated(inputs: Sequence[Tensor]) -> Tensor:
        value = torch.zeros((), device=inputs[0].device)
        for rows in some:
            own = nullcontext() if together is None else sending(together, rows is some[-1])
            with own, matmul_precision(config.precision):
                mean = (together or loss_of)(*(tensor[rows] for tensor in inputs))
                share = (rows.stop - rows.start) / config.batch * mean
                share.backward()
            value = value + share.detach()
        return value

    return accumulated, mode


def overlaps(ranks: Ranks, mode: str) -> bool:
    """Return whether the backward pass sums gradients: between machines; a compiled one gives all at its end."""
    return ranks.nodes > 1 and not mode.startswith(COMPILED)


def parts(count: int, most: int | None) -> list[slice]:
    """Divide `count` examples into as few parts as hold `most` each (None: all), of at most two sizes."""
    number = 1 if most is None else -(-count // most)
    return [slice(count * i // number, count * (i + 1) // number) for i in range(number)]
