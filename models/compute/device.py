"""The choice of the device that a task computes on."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_users: Counter[int] = Counter()

_lock = threading.Lock()


def choose_device(name: str) -> torch.device:
    """`auto` is a GPU where there is one. Raises ValueError if a GPU is asked for and there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("dispatch.device=cuda, but torch sees no GPU: set dispatch.device=auto or fix the driver")
    return torch.device(name)


@contextmanager
def least_used_device(name: str) -> Iterator[torch.device]:
    """choose_device, and where several threads of this process ask at once, the GPU that fewest of them have."""
    device = choose_device(name)
    if device.type != "cuda":
        yield device
        return
    with _lock:
        index = min(range(torch.cuda.device_count()), key=lambda i: (_users[i], i))
        _users[index] += 1
    try:
        yield torch.device("cuda", index)
    finally:
        with _lock:
            _users[index] -= 1
