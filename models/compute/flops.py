"""The FLOP/s of the device at hand, measured: what a step's work is compared with."""

import time

import torch

from functa.models.compute.device import matmul_precision

MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}

MATMUL_SECONDS, MATMUL_RUNS = 0.1, 3

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def matmul_rate(device: torch.device, precision: str) -> float:
    """FLOP/s of one large matrix product here and now, with the threads that this process has: a practical ceiling.

    The fastest of at least three after one that loads the library, so that a busy moment does not count.
    """
    side, kind = MATMUL_SIDE.get(device.type, 1024), DTYPES[precision]
    a, b = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
    best, runs, begun = 0.0, 0, 0.0

    def product() -> None:
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with matmul_precision(precision):
        product()
        begun = time.perf_counter()
        while runs < MATMUL_RUNS or time.perf_counter() - begun < MATMUL_SECONDS:
            start = time.perf_counter()
            product()
            best, runs = max(best, 2 * side**3 / (time.perf_counter() - start)), runs + 1
    return best
