"""Compile a function into one graph under autocast, where that repays itself."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from functa.models.compute.compilation import GRAPHS, should_compile
from functa.models.compute.parallel import keep_memory

Function = Callable[..., Tensor]

WRITTEN_OUT_TOKENS = 128  # at 64 written out was a sixth faster, at 256 a fifth slower (docs/results.md)

# Inductor's random numbers cost more than torch's there, and so do convolutions with channels last on small maps: an
# MLP with dropout and a wide UNet were slower compiled than eager.
CPU_OPTIONS: dict[str, Any] = {"fallback_random": True, "layout_optimization": False}


def graphed(
    function: Function,
    precision: str,
    compilation: str,
    flops: float,
    device: torch.device,
    key: str,
    tokens: int = 0,
) -> tuple[Function, str]:
    """The function as it is to be called, and in which mode; `flops` is the work of all its calls.

    Everything that it takes must be a tensor or None, so that one graph without breaks serves every call; whatever
    else it knows is frozen into that graph. `compilation` is auto, on, graphs (CUDA graphs too) or off. bf16 goes by
    autocast; for tf32 the caller opens matmul_precision, around the backward pass too. `tokens` is the longest sequence
    that attention goes over. Raises ValueError, naming the key, where compilation cannot be had.
    """
    if device.type == "cpu":
        keep_memory()

    # A CPU's fused attention takes most of a step to go backwards; over few tokens it is faster written out.
    written_out = device.type == "cpu" and tokens <= WRITTEN_OUT_TOKENS

    def precise(*tensors: Tensor | None) -> Tensor:
        half = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
        with half, sdpa_kernel(SDPBackend.MATH) if written_out else nullcontext():
            return function(*tensors)

    wanted = "on" if compilation == "graphs" else compilation
    compile_it, why = should_compile(wanted, flops, device, key)
    if not compile_it:
        return precise, why
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    graphs = compilation == "graphs" and device.type == "cuda"
    options = CPU_OPTIONS if device.type == "cpu" else None
    mode = "reduce-overhead" if graphs else None
    compiled = torch.compile(precise, dynamic=False, fullgraph=True, mode=mode, options=options)
    return compiled, why + (", CUDA graphs" if graphs else "")
