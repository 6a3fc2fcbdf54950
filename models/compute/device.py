"""The choice of the device that a task computes on, and of the precision of its matmuls."""

import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_users: Counter[int] = Counter()

_lock = threading.Lock()


def choose_device(name: str) -> torch.device:
    """Return the device of this name; `auto` is a GPU where there is one. Raises ValueError for a missing one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", name) is None:
        raise ValueError(f"device={name}: choose among auto, cpu, cuda and cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name}: torch sees no GPU; choose device=auto, or fix the driver")
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        raise ValueError(f"device={name}: torch sees {count} GPU(s), from cuda:0 on; choose another")
    return device


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """A context in which matmuls of float32 are TF32 if `precision` is tf32: torch has one switch for the process."""
    before = torch.get_float32_matmul_precision()
    if precision == "tf32":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


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
