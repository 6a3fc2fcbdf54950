"""FLOPs of a network as torch counts them: beside them the product's formulas are tested."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def forward_flops(build: Callable[[], nn.Module], inputs: Sequence[Tensor | None]) -> int:
    """Return the FLOPs of one call of the network on inputs of these shapes and types; a multiply-add counts two.

    Matmuls, convolutions and attention are counted, as torch's FlopCounterMode does; nothing is computed.
    """
    with torch.device("meta"):
        network = build().eval()
    shapes = [None if x is None else x.to("meta") for x in inputs]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(*shapes)
    return int(counter.get_total_flops())
