"""Which device a task computes on."""

import torch


def choose_device(name: str) -> torch.device:
    """`auto` is a GPU where there is one. Raises ValueError if a GPU is asked for and there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("dispatch.device=cuda, but torch sees no GPU: set dispatch.device=auto or mend the driver")
    return torch.device(name)
