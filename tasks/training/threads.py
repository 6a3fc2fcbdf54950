"""How many threads a small training takes."""

import torch

SMALL_STEP = 2e9  # FLOPs: less than a tenth of a second of one core


def fit_threads(flops: float, device: torch.device) -> None:
    """One thread for the rest of this process where a step of so many FLOPs is small, on a CPU.

    Its operations are too short to be shared: two threads gain little on idle cores, and beside any other work they
    spend nearly all of the time waiting for each other, since every operation ends in a barrier that needs both to be
    running.
    """
    if device.type == "cpu" and flops < SMALL_STEP:
        torch.set_num_threads(1)
